"""A node as an ordinary Celery worker: `celery -A edge_worker worker`, `celery -A cloud_worker worker`."""

from __future__ import annotations

import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn
from uuid import uuid4

import structlog
from celery import Celery, Task, signals
from celery.exceptions import Ignore
from pydantic import ValidationError

from broker import connection, control, logs
from broker.celery_app import RUN, make_app
from broker.errors import BadSetting, PerLLMError, TaskExpired, TaskFailed, field_errors
from broker.ledger import Ledger
from broker.messages import WIRE_VERSION, NodeInfo
from broker.settings import Settings, load_settings
from broker.worker.engine import Engine
from broker.worker.node import NodeWorker

log = structlog.get_logger(__name__)
Tier = Literal["edge", "cloud"]


def worker_app(tier: Tier, make_engine: Callable[[Settings], Engine]) -> Celery:
    """The Celery app of one node. `make_engine` builds the engine without loading it; it is started with the worker.

    Ends the process with one line and status 2 when a setting is wrong.
    """
    try:
        settings = load_settings()
        ledger = Ledger(settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT)
        engine = make_engine(settings)
    except PerLLMError as error:
        _die(error)
    name = settings.node_name or re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64].lstrip("-_") or tier
    app = make_app(settings, queue=f"{tier}.{name}", concurrency=engine.slots)
    _Lifecycle(app, tier, name, settings, ledger, engine)
    return app


class _Lifecycle:
    """Ties a node's life to its Celery worker's by Celery's signals, and answers the node queue's one task."""

    def __init__(self, app: Celery, tier: Tier, name: str, settings: Settings, ledger: Ledger, engine: Engine) -> None:
        self._tier, self._name, self._settings, self._ledger, self._engine = tier, name, settings, ledger, engine
        self._node: NodeWorker | None = None
        # weak=False: nothing else keeps these bound methods alive
        signals.setup_logging.connect(self._log, weak=False)
        signals.worker_init.connect(self._load, weak=False)
        signals.worker_ready.connect(self._join, weak=False)
        signals.worker_shutting_down.connect(self._drain, weak=False)
        signals.worker_shutdown.connect(self._leave, weak=False)
        # Failures are results here: they are in the ledger before Celery hears of them, so no traceback in the log.
        app.task(bind=True, name=RUN, typing=False, throws=(TaskFailed, TaskExpired))(self._make_task())

    def _log(self, **_: Any) -> None:
        logs.configure(self._settings)

    def _load(self, **_: Any) -> None:
        control.restrict(self._ledger)
        with self._or_die():
            connection.check(self._settings)
            self._engine.start()
            info = NodeInfo(
                name=self._name,
                tier=self._tier,
                boot=uuid4().hex,
                slots=self._engine.slots,
                models=self._engine.offers(),
                power=self._engine.power(),
                bandwidth=self._settings.bandwidth,
                engine=self._engine.description,
            )
            self._node = NodeWorker(self._settings, self._ledger, self._engine, info)

    def _join(self, **_: Any) -> None:
        with self._or_die():
            assert self._node is not None
            self._node.start()

    @contextmanager
    def _or_die(self) -> Iterator[None]:
        """Whatever goes wrong at the start ends the process. Celery would log it and go on, a worker without a node."""
        try:
            yield
        except ValidationError as error:
            self._close()
            _die(BadSetting(f"this node cannot be registered: {field_errors(error)}"))
        except PerLLMError as error:
            self._close()
            _die(error)
        except Exception:
            log.exception("start_failed", node=self._name)
            self._close()
            sys.exit(1)

    def _close(self) -> None:
        (self._node or self._engine).close()

    def _drain(self, **_: Any) -> None:
        # Celery calls this inside its signal handler: no I/O there, so a thread of its own does it.
        if self._node is not None:
            threading.Thread(target=self._node.drain, name="perllm-drain", daemon=True).start()

    def _leave(self, **_: Any) -> None:
        if self._node is not None:
            self._node.close()

    def _make_task(self) -> Callable[..., str]:
        def run(task: Task, *args: Any, attempt: Any = None, v: Any = WIRE_VERSION, **_: Any) -> str:
            if args or type(attempt) is not int or v != WIRE_VERSION:
                log.warning("foreign_message", task_id=task.request.id, queue=f"{self._tier}.{self._name}")
                return "ignored: not a message of the scheduler"
            assert self._node is not None
            with structlog.contextvars.bound_contextvars(task_id=task.request.id, node=self._name):
                line = self._node.run(task.request.id, attempt)
            if line.startswith(("void", "stopped")):  # to Celery too this attempt is no success of the task's
                raise Ignore(line)
            return line

        return run


def _die(error: PerLLMError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
