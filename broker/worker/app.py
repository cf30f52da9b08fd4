"""A node as an ordinary Celery worker: `celery -A perllm.edge_worker worker`, or of `perllm.cloud_worker`."""

from __future__ import annotations

import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, Literal, TypeVar
from uuid import uuid4

import structlog
from celery import Celery, Task, signals
from celery.exceptions import Ignore
from pydantic import ValidationError

from perllm.broker import connection, logs
from perllm.broker.engine.contract import Engine
from perllm.broker.errors import BadSetting, PerLLMError, TaskExpired, TaskFailed, Unreachable, exit_with, field_errors
from perllm.broker.ledger import Ledger
from perllm.broker.messages import WIRE_VERSION, NodeInfo, State
from perllm.broker.queues import control
from perllm.broker.queues.app import RUN, configuration, lazy_app
from perllm.broker.settings import load_settings
from perllm.broker.worker.node import NodeWorker
from perllm.broker.worker.settings import WorkerSettings

log = structlog.get_logger(__name__)
Tier = Literal["edge", "cloud"]
S = TypeVar("S", bound=WorkerSettings)


def worker_app(tier: Tier, settings: type[S], make_engine: Callable[[S], Engine]) -> Celery:
    """The Celery app of one node: its settings are read, and its engine made, when Celery asks how it is configured.

    `make_engine` builds the engine without loading it; it is started with the worker.
    """
    return _Node(tier, settings, make_engine).app


class _Node(Generic[S]):
    """Ties a node's life to its Celery worker's by Celery's signals, and answers the node queue's one task."""

    _name: str
    _settings: S
    _ledger: Ledger
    _engine: Engine

    def __init__(self, tier: Tier, model: type[S], make_engine: Callable[[S], Engine]) -> None:
        self._tier, self._model, self._make_engine = tier, model, make_engine
        self._worker: NodeWorker | None = None
        self.app = lazy_app(self._configure)
        # Failures are results here: they are in the ledger before Celery hears of them, so no traceback in the log.
        # Acknowledged late, so that what is at hand and not yet done is bounded.
        self.app.task(bind=True, name=RUN, typing=False, acks_late=True, throws=(TaskFailed, TaskExpired))(
            self._make_task()
        )

    def _configure(self) -> dict[str, Any]:
        """Celery's configuration. Raises PerLLMError."""
        settings = self._settings = load_settings(self._model)
        self._name = settings.node_name or _host_name() or self._tier
        self._ledger = Ledger(settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT)
        self._engine = self._make_engine(settings)
        # weak=False: nothing else keeps these bound methods alive
        signals.celeryd_init.connect(self._log, weak=False)  # an engine speaks while it is loaded
        signals.setup_logging.connect(self._log, weak=False)
        signals.worker_init.connect(self._load, weak=False)
        signals.worker_ready.connect(self._join, weak=False)
        signals.worker_shutting_down.connect(self._drain, weak=False)
        signals.worker_shutdown.connect(self._leave, weak=False)
        return configuration(settings, queue=f"{self._tier}.{self._name}", concurrency=self._engine.slots)

    def _log(self, **_: Any) -> None:
        logs.configure(self._settings)

    def _load(self, **_: Any) -> None:
        control.restrict(self._ledger)
        with self._or_exit():
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
            self._worker = NodeWorker(self._settings, self._ledger, self._engine, info)

    def _join(self, **_: Any) -> None:
        with self._or_exit():
            assert self._worker is not None
            self._worker.start()

    @contextmanager
    def _or_exit(self) -> Iterator[None]:
        """Whatever goes wrong at the start ends the process. Celery would log it and go on, a worker without a node."""
        try:
            yield
        except ValidationError as error:
            self._close()
            exit_with(BadSetting(f"this node cannot be registered: {field_errors(error)}"))
        except PerLLMError as error:
            self._close()
            exit_with(error)
        except Exception:
            log.exception("start_failed", node=self._name)
            self._close()
            sys.exit(1)

    def _close(self) -> None:
        (self._worker or self._engine).close()

    def _drain(self, **_: Any) -> None:
        # Celery calls this inside its signal handler: no I/O there, so a thread of its own does it.
        if self._worker is not None:
            threading.Thread(target=self._worker.drain, name="perllm-drain", daemon=True).start()

    def _leave(self, **_: Any) -> None:
        if self._worker is not None:
            self._worker.close()

    def _make_task(self) -> Callable[..., str]:
        def run(task: Task, *args: Any, attempt: Any = None, v: Any = WIRE_VERSION, **_: Any) -> str:
            if args or type(attempt) is not int or v != WIRE_VERSION:
                log.warning("foreign_message", task_id=task.request.id, queue=f"{self._tier}.{self._name}")
                return "ignored: not a message of the scheduler"
            assert self._worker is not None
            with structlog.contextvars.bound_contextvars(task_id=task.request.id, node=self._name):
                line = self._worker.run(task.request.id, attempt)
            if line.startswith(("void", "stopped")):  # to Celery too this attempt is no success of the task's
                if self._is_cancelled(task.request.id):
                    task.send_event("task-revoked", terminated=line.startswith("stopped"), signum=None, expired=False)
                raise Ignore(line)
            return line

        return run

    def _is_cancelled(self, task_id: str) -> bool:
        """Whether Flower is to show it revoked; as it was shown before, where the server does not say."""
        with suppress(Unreachable):
            return self._ledger.states([task_id]) == [State.CANCELLED]
        return False


def _host_name() -> str:
    """The machine's, as a node may be called; may be empty."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64].lstrip("-_")
