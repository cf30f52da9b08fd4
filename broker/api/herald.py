"""Tells webhooks what became of tasks and batches: reads the event stream, makes deliveries, sends out those due.

It may tell of the same thing twice after a crash; the delivery is the same then. A batch's tasks are not told of one by
one: its end is.
"""

from __future__ import annotations

from typing import Any

import structlog
from celery import Celery

from broker.api.batch_store import BatchDocument, shown
from broker.api.duty import Duty
from broker.api.webhook_store import Webhooks
from broker.celery_app import make_app
from broker.dialect import receipt_fields
from broker.ledger import Ledger
from broker.ledger.ledger import gap
from broker.messages import Completed, Ended
from broker.settings import Settings

#: The Celery task that makes one attempt at a delivery, and the queue it travels by.
DELIVER, QUEUE = "perllm.deliver", "webhooks"
#: Events read, and deliveries sent out, at once.
READ, SEND = 1000, 200

log = structlog.get_logger(__name__)


class Herald(Duty):
    """Does next to nothing while no tenant has a webhook."""

    def __init__(self, settings: Settings, ledger: Ledger, hooks: Webhooks) -> None:
        super().__init__(settings, ledger, "webhooks")
        self._hooks = hooks
        self._celery: Celery | None = None

    def round(self) -> None:
        """Hear what happened, and send out what is due."""
        tenants = self._hooks.tenants()
        while tenants and self._hear(tenants):
            self.hold()
        for delivery_id in self._hooks.take_due(SEND):
            self._producer().send_task(DELIVER, args=[delivery_id], queue=QUEUE, ignore_result=True)

    def _hear(self, tenants: set[str]) -> bool:
        """Whether there is more to hear."""
        position = self._hooks.position()
        events = self._ledger.events(position, count=READ)
        if events and gap(position, self._ledger.first_and_last_event()[0]):
            log.warning("events_missed", hint="nobody told webhooks for longer than PERLLM_STREAM_LENGTH events last")
        ends = {e.id: e.state for _, e in events if isinstance(e, Completed | Ended) and not e.id.startswith("batch_")}
        if ends:
            for (task_id, state), tenant in zip(ends.items(), self._ledger.tenants(list(ends)), strict=True):
                if tenant in tenants:
                    self._hooks.announce(tenant, f"task.{state}", task_id, self._told(task_id))
        if events:
            self._hooks.advance(events[-1][0])
        return len(events) >= READ

    def _told(self, task_id: str) -> dict[str, Any]:
        """What is told of a task: everything but its text."""
        record = self._ledger.task(task_id)
        told: dict[str, Any] = {"id": task_id, "object": "task"}
        if record is None:
            return told
        told |= {"state": record.state, "service": record.spec.service, "metadata": dict(record.spec.metadata)}
        return told | ({"reason": record.result.reason, **receipt_fields(record.result)} if record.result else {})

    def batch_ended(self, batch: BatchDocument) -> None:
        """Tell of a batch."""
        self._hooks.announce(batch.tenant, f"batch.{batch.status}", batch.id, shown(batch))

    def _producer(self) -> Celery:
        if self._celery is None:
            self._celery = make_app(self._settings, queue=QUEUE)
        return self._celery
