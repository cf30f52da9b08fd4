"""`celery -A broker worker`: the inbox, the door for plain Celery producers in any language.

They send `perllm.generate` with a TaskSpec's fields as keyword arguments (or one object as the only argument). It is
submitted to the ledger under the message's own id and answers nothing itself: the producer's `AsyncResult` stays
pending until the ledger stores the real result under that id.
"""

from __future__ import annotations

import sys
from typing import Any

import structlog
from celery import Task, signals
from celery.exceptions import Ignore

from broker import connection, logs
from broker.celery_app import GENERATE, make_app
from broker.door import Door
from broker.errors import InvalidTask, PerLLMError
from broker.ledger import Ledger
from broker.settings import load_settings

log = structlog.get_logger(__name__)

try:
    settings = load_settings()
except PerLLMError as error:
    sys.exit(f"error: {error}")

app = make_app(settings, concurrency=4)
_ledger = Ledger(settings)
_door = Door(settings, _ledger)


@signals.setup_logging.connect
def _log(**_: Any) -> None:
    logs.configure(settings)


@signals.worker_init.connect
def _check(**_: Any) -> None:
    try:
        connection.check(settings)
    except PerLLMError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@app.task(bind=True, name=GENERATE, typing=False, ignore_result=False, throws=(InvalidTask,), max_retries=None)
def generate(task: Task, *args: Any, **fields: Any) -> None:
    """Submit to the ledger under this message's id. Raises InvalidTask for the producer's `AsyncResult` to show."""
    if args:
        if len(args) != 1 or fields or not isinstance(args[0], dict):
            raise InvalidTask("send the task's fields as keyword arguments, or as one object")
        fields = args[0]
    try:
        _ledger.submit([(task.request.id, _door.accept(fields))])
    except InvalidTask as error:
        log.info("task_refused", task_id=task.request.id, reason=str(error))
        raise
    raise Ignore
