"""`celery -A perllm.broker worker`: the inbox, for plain Celery producers in any language.

They send `perllm.generate` with a TaskSpec's fields as keyword arguments (or one object as the only argument), or
`perllm.embed`, for a task of the kind `embed`, whose only argument may also be its texts. It is
submitted to the ledger under the message's own id and answers nothing itself: the producer's `AsyncResult` stays
pending until the ledger stores the real result under that id.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import structlog
from celery import Task, signals
from celery.exceptions import Ignore, Reject

from perllm.broker import connection, logs
from perllm.broker.errors import InvalidTask, PerLLMError, Unreachable, exit_with
from perllm.broker.ledger import Ledger, is_id
from perllm.broker.queues import control
from perllm.broker.queues.app import EMBED, GENERATE, configuration, lazy_app
from perllm.broker.settings import load_settings
from perllm.broker.validation import TaskValidator

#: Seconds after which a message that an inbox took and did not finish (it was killed) is taken up again.
REDELIVERY = 60.0
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
        self.validator = TaskValidator(self.settings, self.ledger)
        made = configuration(self.settings, concurrency=4)
        made["broker_transport_options"]["visibility_timeout"] = REDELIVERY
        signals.setup_logging.connect(self._log, weak=False)
        signals.worker_init.connect(self._check, weak=False)
        signals.worker_shutting_down.connect(self._stop, weak=False)
        signals.task_unknown.connect(self._unknown, weak=False)
        signals.task_revoked.connect(self._expired, weak=False)
        return made

    def _log(self, **_: Any) -> None:
        logs.configure(self.settings)

    def _check(self, **_: Any) -> None:
        control.restrict(self.ledger)
        try:
            connection.check(self.settings)
        except PerLLMError as error:
            exit_with(error)

    def _stop(self, **_: Any) -> None:
        _stopping.set()

    # Messages that Celery itself lets become no task

    def _unknown(self, name: str = "", id: str = "", **_: Any) -> None:
        self._refuse(id, "FAILURE", f"there is no task {name[:80]!r}: send {GENERATE!r} or {EMBED!r}")

    def _expired(self, request: Any = None, expired: bool = False, **_: Any) -> None:
        if expired:
            self._refuse(request.id, "REVOKED", "expired")

    def _refuse(self, task_id: str, status: Literal["FAILURE", "REVOKED"], reason: str) -> None:
        try:
            self.ledger.refuse(task_id, status, reason)
        except Unreachable as error:
            log.warning("refusal_not_stored", task_id=task_id, reason=str(error))


_inbox = _Inbox()
app = lazy_app(_inbox.configure)


# Acknowledged late: submitting the same id twice does no harm, losing one would.
@app.task(
    bind=True,
    name=GENERATE,
    typing=False,
    acks_late=True,
    ignore_result=False,
    throws=(InvalidTask,),
)
def generate(task: Task, *args: Any, **fields: Any) -> None:
    """Submit to the ledger under this message's id. Raises InvalidTask for the producer's `AsyncResult` to show."""
    _take_in(task, args, fields)


@app.task(
    bind=True,
    name=EMBED,
    typing=False,
    acks_late=True,
    ignore_result=False,
    throws=(InvalidTask,),
)
def embed(task: Task, *args: Any, **fields: Any) -> None:
    """The same for an embedding task."""
    match args:
        case (str() | list() as texts,):
            args, fields = (), {"inputs": [texts] if isinstance(texts, str) else texts, **fields}
        case (dict() as given,):
            args, fields = (), {**given, **fields}
    _take_in(task, args, {"kind": "embed", **fields})


def _take_in(task: Task, args: tuple[Any, ...], fields: Mapping[str, Any]) -> None:
    task_id = task.request.id
    try:
        _retry(task_id, lambda: _submit(task_id, args, fields))
    except InvalidTask as error:
        reason = str(error)
        log.info("task_refused", task_id=task_id, reason=reason)
        _retry(task_id, lambda: _inbox.ledger.refuse(task_id, "FAILURE", reason))
        raise
    raise Ignore


def _retry(task_id: str, call: Callable[[], None]) -> None:
    """Until the server takes it: nobody else has the message. Who stops meanwhile puts it back."""
    while True:
        try:
            return call()
        except Unreachable as error:
            log.warning("submission_delayed", task_id=task_id, reason=str(error))
            if _stopping.wait(random.uniform(*RETRY_PAUSE)):
                raise Reject(str(error), requeue=True) from None


def _submit(task_id: str, args: tuple[Any, ...], fields: Mapping[str, Any]) -> None:
    if not is_id(task_id):
        raise InvalidTask(
            f"the message's id must be at most 255 letters, digits and any of ._:- (given {task_id[:40]!r})"
        )
    if args:
        if len(args) != 1 or fields or not isinstance(args[0], dict):
            raise InvalidTask("send the task's fields as keyword arguments, or as one object")
        fields = args[0]
    spec = _inbox.validator.accept(fields)
    in_force = _inbox.ledger.submit([(task_id, spec)])[0]
    if in_force != task_id:  # nothing will ever be stored under this id
        raise InvalidTask(f"idempotency_key: {spec.idempotency_key!r} is task {in_force}'s: ask for its result instead")
