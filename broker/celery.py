"""`celery -A broker worker`: the inbox, the door for plain Celery producers in any language.

They send `perllm.generate` with a TaskSpec's fields as keyword arguments (or one object as the only argument). It is
submitted to the ledger under the message's own id and answers nothing itself: the producer's `AsyncResult` stays
pending until the ledger stores the real result under that id.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn

import structlog
from celery import Task, signals
from celery.exceptions import Ignore, Reject

from broker import connection, control, logs
from broker.celery_app import GENERATE, make_app
from broker.door import Door
from broker.errors import InvalidTask, PerLLMError, Unreachable
from broker.ledger import Ledger
from broker.ledger.ledger import is_id
from broker.settings import load_settings

#: Seconds after which a message that an inbox took and did not finish (it was killed) is taken up again.
REDELIVERY = 60.0
#: Seconds between tries to hand a task in while the server does not take it, drawn at random.
PAUSE = (0.2, 1.0)

log = structlog.get_logger(__name__)


def _die(error: PerLLMError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


try:
    settings = load_settings()
    _ledger = Ledger(settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT)
except PerLLMError as error:
    _die(error)

app = make_app(settings, concurrency=4)
app.conf.broker_transport_options["visibility_timeout"] = REDELIVERY
_door = Door(settings, _ledger)


@signals.setup_logging.connect
def _log(**_: Any) -> None:
    logs.configure(settings)


_stopping = threading.Event()


@signals.worker_shutting_down.connect
def _stop(**_: Any) -> None:
    _stopping.set()


@signals.worker_init.connect
def _check(**_: Any) -> None:
    control.restrict(_ledger)
    try:
        connection.check(settings)
    except PerLLMError as error:
        _die(error)


# --- messages that Celery itself lets become no task


@signals.task_unknown.connect
def _unknown(name: str = "", id: str = "", **_: Any) -> None:
    _refuse(id, "FAILURE", f"there is no task {name[:80]!r}: send {GENERATE!r}")


@signals.task_revoked.connect
def _expired(request: Any = None, expired: bool = False, **_: Any) -> None:
    if expired:
        _refuse(request.id, "REVOKED", "expired")


def _refuse(task_id: str, status: Literal["FAILURE", "REVOKED"], reason: str) -> None:
    try:
        _ledger.refuse(task_id, status, reason)
    except Unreachable as error:
        log.warning("refusal_untold", task_id=task_id, reason=str(error))


# Acknowledged late: handing in the same id twice does no harm, losing one would.
@app.task(
    bind=True,
    name=GENERATE,
    typing=False,
    acks_late=True,
    throws=(InvalidTask,),
)
def generate(task: Task, *args: Any, **fields: Any) -> None:
    """Submit to the ledger under this message's id. Raises InvalidTask for the producer's `AsyncResult` to show."""
    task_id = task.request.id
    try:
        _patiently(task_id, lambda: _hand_in(task_id, args, fields))
    except InvalidTask as error:
        reason = str(error)
        log.info("task_refused", task_id=task_id, reason=reason)
        _patiently(task_id, lambda: _ledger.refuse(task_id, "FAILURE", reason))
        raise
    raise Ignore


def _patiently(task_id: str, hand_in: Callable[[], None]) -> None:
    """Do it, whenever the server takes it: nobody else has the message. Who stops meanwhile puts it back."""
    while True:
        try:
            return hand_in()
        except Unreachable as error:
            log.warning("submission_delayed", task_id=task_id, reason=str(error))
            if _stopping.wait(random.uniform(*PAUSE)):
                raise Reject(str(error), requeue=True) from None


def _hand_in(task_id: str, args: tuple[Any, ...], fields: Mapping[str, Any]) -> None:
    if not is_id(task_id):
        raise InvalidTask(
            f"the message's id must be at most 255 letters, digits and any of ._:- (given {task_id[:40]!r})"
        )
    if args:
        if len(args) != 1 or fields or not isinstance(args[0], dict):
            raise InvalidTask("send the task's fields as keyword arguments, or as one object")
        fields = args[0]
    spec = _door.accept(fields)
    in_force = _ledger.submit([(task_id, spec)])[0]
    if in_force != task_id:  # nothing will ever be stored under this id
        raise InvalidTask(f"idempotency_key: {spec.idempotency_key!r} is task {in_force}'s: ask for its result instead")
