"""Makes deliveries of what happened to tasks and batches, and has webhook workers post them.

After a crash the same event may be added twice; its delivery is the same then. A batch's tasks have no events of their
own: its end has.
"""

from __future__ import annotations

from typing import Any

import structlog
from celery import Celery

from perllm.broker.api.batches.store import BatchDocument, batch_object
from perllm.broker.api.leased_worker import LeasedWorker
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.api.webhooks.store import QUEUE, Webhooks
from perllm.broker.errors import Unreachable, Unreadable
from perllm.broker.ledger import Ledger, TaskRecord
from perllm.broker.ledger.events import gap
from perllm.broker.messages import Completed, Ended, State
from perllm.broker.openai.receipts import receipt_fields
from perllm.broker.openai.responses import is_background, status
from perllm.broker.queues.app import make_app

#: The Celery task that delivers to a webhook under a lease.
DELIVER = "perllm.deliver"
#: Events read at once: few enough that leases are granted often meanwhile.
READ_EVENTS = 200

log = structlog.get_logger(__name__)


class WebhookDispatcher(LeasedWorker):
    """Does next to nothing while no tenant has a webhook."""

    def __init__(self, settings: ApiSettings, store: ApiStore, ledger: Ledger, webhooks: Webhooks) -> None:
        super().__init__(store, "webhooks")
        self._settings, self._ledger, self._webhooks = settings, ledger, webhooks
        self._celery: Celery | None = None

    def round(self) -> None:
        """Read new events, and send out leases for what is due."""
        tenants = self._webhooks.tenants()
        while tenants and self._read_events(tenants):
            self._send_leases()  # however many events there are
            self.renew()
        self._send_leases()

    def _send_leases(self) -> None:
        for lease in self._webhooks.grant_leases():
            self._producer().send_task(DELIVER, args=list(lease), queue=QUEUE, ignore_result=True)

    def _read_events(self, tenants: set[str]) -> bool:
        """Whether there are more."""
        position = self._webhooks.position()
        events = self._ledger.events(position, count=READ_EVENTS)
        if events and gap(position, self._ledger.first_and_last_event()[0]):
            log.warning("events_missed", hint="no API process ran for longer than PERLLM_STREAM_LENGTH events last")
        ends = {e.id: e.state for _, e in events if isinstance(e, Completed | Ended) and not e.id.startswith("batch_")}
        if ends:
            for (task_id, state), tenant in zip(ends.items(), self._ledger.tenants(list(ends)), strict=True):
                if tenant in tenants:
                    self._task_ended(tenant, state, task_id)
        if events:
            self._webhooks.advance(events[-1][0])
        return len(events) >= READ_EVENTS

    def _task_ended(self, tenant: str, state: State, task_id: str) -> None:
        """Add a task's event, and OpenAI's own where it is a response in the background. If that fails, the others' are
        added all the same."""
        try:
            record, data = self._event_data(task_id, state)
            self._webhooks.add_event(tenant, f"task.{state}", task_id, data)
            if record is not None and is_background(record.spec):
                event = f"response.{status(record.state, record.result)}"
                self._webhooks.add_event(tenant, event, task_id, {"id": task_id})
        except Unreachable:
            raise
        except Exception:
            log.exception("task_event_lost", task_id=task_id)

    def _event_data(self, task_id: str, state: State) -> tuple[TaskRecord | None, dict[str, Any]]:
        """A task, if it is there and can be read, and everything of it but its text."""
        data: dict[str, Any] = {"id": task_id, "object": "task"}
        try:
            record = self._ledger.task(task_id)
        except Unreadable as error:
            log.warning("task_unreadable", task_id=task_id, reason=str(error))
            return None, data | {"state": state, "reason": "what is stored of it cannot be read"}
        if record is None:
            return None, data
        data |= {"state": record.state, "service": record.spec.service, "metadata": dict(record.spec.metadata)}
        told = {"reason": record.result.reason, **receipt_fields(record.result)} if record.result else {}
        return record, data | told

    def batch_ended(self, batch: BatchDocument) -> None:
        """Add a batch's event."""
        self._webhooks.add_event(batch.tenant, f"batch.{batch.status}", batch.id, batch_object(batch))

    def _producer(self) -> Celery:
        if self._celery is None:
            self._celery = make_app(self._settings, queue=QUEUE)
        return self._celery
