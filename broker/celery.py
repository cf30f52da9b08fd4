"""`celery -A perllm.broker worker`: the inbox, for plain Celery producers in any language.

They send `perllm.generate` with a TaskSpec's fields as keyword arguments (or one object as the only argument). It is
submitted to the ledger under the message's own id and answers nothing itself: the producer's `AsyncResult` stays
pending until the ledger stores the real result under that id.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Mapping
from typing import Any

import structlog
from celery import Task, signals
from celery.exceptions import Ignore, Reject

from perllm.broker import connection, logs
from perllm.broker.errors import InvalidTask, PerLLMError, Unreachable, exit_with
from perllm.broker.ledger import Ledger
from perllm.broker.queues.app import GENERATE, configuration, lazy_app
from perllm.broker.settings import load_settings
from perllm.broker.validation import TaskValidator

#: Seconds after which a message that an inbox took and did not finish (it was killed) is taken up again.
REDELIVERY = 60.0
#: Seconds between tries to submit a task while the server does not take it, at random.
RETRY_PAUSE = (0.2, 1.0)

log = structlog.get_logger(__name__)
#: Ids are the producers' own; they become parts of keys and messages.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}")


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
        return made

    def _log(self, **_: Any) -> None:
        logs.configure(self.settings)

    def _check(self, **_: Any) -> None:
        try:
            connection.check(self.settings)
        except PerLLMError as error:
            exit_with(error)

    def _stop(self, **_: Any) -> None:
        _stopping.set()


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
    if args:
        if len(args) != 1 or fields or not isinstance(args[0], dict):
            raise InvalidTask("send the task's fields as keyword arguments, or as one object")
        fields = args[0]
    try:
        _submit_or_wait(task.request.id, fields)
    except InvalidTask as error:
        log.info("task_refused", task_id=task.request.id, reason=str(error))
        raise
    raise Ignore


def _submit_or_wait(task_id: str, fields: Mapping[str, Any]) -> None:
    """Submit, whenever the server takes it: nobody else has the message. Who stops meanwhile puts it back."""
    while True:
        try:
            return _submit(task_id, fields)
        except Unreachable as error:
            log.warning("submission_delayed", task_id=task_id, reason=str(error))
            if _stopping.wait(random.uniform(*RETRY_PAUSE)):
                raise Reject(str(error), requeue=True) from None


def _submit(task_id: str, fields: Mapping[str, Any]) -> None:
    if not _ID.fullmatch(task_id):
        raise InvalidTask(
            f"the message's id must be at most 255 letters, digits and any of ._:- (given {task_id[:40]!r})"
        )
    spec = _inbox.validator.accept(fields)
    in_force = _inbox.ledger.submit([(task_id, spec)])[0]
    if in_force != task_id:  # nothing will ever be stored under this id
        raise InvalidTask(f"idempotency_key: {spec.idempotency_key!r} is task {in_force}'s: ask for its result instead")
