"""Tells webhooks what became of tasks and batches: reads the event stream, makes deliveries, gives webhooks turns.

It may tell of the same thing twice after a crash; the delivery is the same then. A batch's tasks are not told of one by
one: its end is.
"""

from __future__ import annotations

from typing import Any

import structlog
from celery import Celery

from perllm.broker.api.batches.store import BatchDocument, shown
from perllm.broker.api.leased_worker import LeasedWorker
from perllm.broker.api.webhooks.store import QUEUE, Webhooks
from perllm.broker.errors import Unreachable, Unreadable
from perllm.broker.ledger import Ledger
from perllm.broker.messages import Completed, Ended, State
from perllm.broker.openai.translation import receipt_fields
from perllm.broker.queues.app import make_app
from perllm.broker.settings import Settings

#: The Celery task that is a webhook's turn.
DELIVER = "perllm.deliver"
#: Events read at once: few enough that turns are given often meanwhile.
READ = 200

log = structlog.get_logger(__name__)


class WebhookDispatcher(LeasedWorker):
    """Does next to nothing while no tenant has a webhook."""

    def __init__(self, settings: Settings, ledger: Ledger, hooks: Webhooks) -> None:
        super().__init__(settings, ledger, "webhooks")
        self._hooks = hooks
        self._celery: Celery | None = None

    def round(self) -> None:
        """Hear what happened, and have sent out what is due."""
        tenants = self._hooks.tenants()
        while tenants and self._hear(tenants):
            self._give_turns()  # however much there is to hear
            self.hold()
        self._give_turns()

    def _give_turns(self) -> None:
        for turn in self._hooks.give_turns():
            self._producer().send_task(DELIVER, args=list(turn), queue=QUEUE, ignore_result=True)

    def _hear(self, tenants: set[str]) -> bool:
        """Whether there is more to hear."""
        position = self._hooks.position()
        events = self._ledger.events(position, count=READ)
        if events and _before(position, self._ledger.first_and_last_event()[0]):
            log.warning("events_missed", hint="nobody told webhooks for longer than PERLLM_STREAM_LENGTH events last")
        ends = {e.id: e.state for _, e in events if isinstance(e, Completed | Ended) and not e.id.startswith("batch_")}
        if ends:
            for (task_id, state), tenant in zip(ends.items(), self._ledger.tenants(list(ends)), strict=True):
                if tenant in tenants:
                    self._tell(tenant, state, task_id)
        if events:
            self._hooks.advance(events[-1][0])
        return len(events) == READ

    def _tell(self, tenant: str, state: State, task_id: str) -> None:
        """Tell of one task. If that fails, the others are told of all the same."""
        try:
            self._hooks.announce(tenant, f"task.{state}", task_id, self._told(task_id, state))
        except Unreachable:
            raise
        except Exception:
            log.exception("task_untold", task_id=task_id)

    def _told(self, task_id: str, state: State) -> dict[str, Any]:
        """What is told of a task: everything but its text."""
        told: dict[str, Any] = {"id": task_id, "object": "task"}
        try:
            record = self._ledger.task(task_id)
        except Unreadable as error:
            log.warning("task_unreadable", task_id=task_id, reason=str(error))
            return told | {"state": state, "reason": "what is stored of it cannot be read"}
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


def _before(position: str, first: str) -> bool:
    """Whether a stream position is older than the first entry still kept, so that some may be gone."""
    return position != "0-0" and [int(n) for n in position.split("-")] < [int(n) for n in first.split("-")]
