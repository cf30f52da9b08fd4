"""`celery -A perllm.broker worker`: the inbox, for plain Celery producers in any language.

They send `perllm.generate` or `perllm.embed` with a TaskSpec's fields as keyword arguments. It is submitted to the
ledger under the message's own id and answers nothing itself: the producer's `AsyncResult` shows what the ledger writes
under that id as the task starts and ends. What is to follow it (a chain, a chord, callbacks) is sent when it has
ended.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import structlog
from celery import Task, signals
from celery.exceptions import Ignore, Reject

from perllm.broker import connection, logs
from perllm.broker.errors import PerLLMError, Unreachable, exit_with
from perllm.broker.inbox.events import Events
from perllm.broker.inbox.following import Following
from perllm.broker.inbox.inbox import Inbox
from perllm.broker.ledger import Ledger
from perllm.broker.queues import control
from perllm.broker.queues.app import EMBED, GENERATE, INBOX, configuration, lazy_app
from perllm.broker.settings import load_settings

#: Seconds after which a message that an inbox took and did not finish (it was killed) is taken up again.
REDELIVERY = 60.0
#: No message is lost on its way here; and where they are noted, apart from those of a producer's own Celery workers.
KEPT = {
    "kept_queue": INBOX,
    "unacked_key": "inbox:unacked",
    "unacked_index_key": "inbox:unacked_index",
    "unacked_mutex_key": "inbox:unacked_mutex",
}
#: Seconds between tries to submit a task while the server does not take it, at random.
RETRY_PAUSE = (0.2, 1.0)

log = structlog.get_logger(__name__)

_stopping = threading.Event()


class _Inbox:
    """What the inbox works with, made when Celery asks how it is configured."""

    def configure(self) -> dict[str, Any]:
        """Raises PerLLMError."""
        self.settings = load_settings()
        self.ledger = Ledger(self.settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT)
        self.events = Events(app)
        self.inbox = Inbox(self.settings, self.ledger, self.events)
        self.following = Following(self.ledger, self.inbox.sender, self.events)
        made = configuration(self.settings, concurrency=4)
        made["broker_transport_options"] |= {"visibility_timeout": REDELIVERY, **KEPT}
        signals.celeryd_init.connect(self._log, weak=False)
        signals.setup_logging.connect(self._log, weak=False)
        signals.worker_init.connect(self._check, weak=False)
        signals.worker_ready.connect(self._follow, weak=False)
        signals.worker_shutting_down.connect(self._stop, weak=False)
        signals.worker_shutdown.connect(self._close, weak=False)
        signals.task_unknown.connect(self._unknown, weak=False)
        return made

    def _log(self, **_: Any) -> None:
        logs.configure(self.settings)

    def _check(self, **_: Any) -> None:
        control.restrict(self.ledger)
        try:
            connection.check(self.settings)
        except PerLLMError as error:
            exit_with(error)

    def _follow(self, sender: Any = None, **_: Any) -> None:
        self.events.hostname = sender.hostname
        self.following.start()

    def _stop(self, **_: Any) -> None:
        _stopping.set()

    def _close(self, **_: Any) -> None:
        self.following.close()

    def _unknown(self, name: str = "", id: str = "", **_: Any) -> None:
        """A message that Celery itself lets become no task."""
        try:
            self.ledger.refuse(id, "refused", f"there is no task {name[:80]!r}: send {GENERATE!r} or {EMBED!r}")
        except Unreachable as error:
            log.warning("refusal_not_stored", task_id=id, reason=str(error))


_inbox = _Inbox()
app = lazy_app(_inbox.configure)


def submit(task: Task, *args: Any, **fields: Any) -> None:
    """Submit to the ledger under this message's id, or tell the producer why not."""
    _retry(task.request.id, partial(_inbox.inbox.take_in, task.request, args, fields))
    raise Ignore


for _name in (GENERATE, EMBED):
    app.task(
        submit,
        bind=True,
        name=_name,
        typing=False,
        acks_late=True,  # submitting the same id twice does no harm, losing one would
        Strategy="perllm.broker.inbox.request:strategy",
        Request="perllm.broker.inbox.request:Arrival",
    )


def _retry(task_id: str, call: Callable[[], object]) -> None:
    """Until the server takes it: nobody else has the message. Who stops meanwhile puts it back."""
    while True:
        try:
            call()
            return
        except Unreachable as error:
            log.warning("submission_delayed", task_id=task_id, reason=str(error))
            if _stopping.wait(random.uniform(*RETRY_PAUSE)):
                raise Reject(str(error), requeue=True) from None
