"""What the inbox tells Flower, by Celery's events, of tasks that no node has begun."""

from __future__ import annotations

from typing import Any

import structlog
from celery import Celery
from celery.app.task import Context
from kombu.exceptions import OperationalError

from perllm.broker.inbox.request import ETA, EXPIRES
from perllm.broker.ledger import EndKind

log = structlog.get_logger(__name__)


class Events:
    """In the name of `app`'s worker, once that is known as `hostname`. What cannot be told is left out."""

    hostname: str | None = None

    def __init__(self, app: Celery) -> None:
        self._app = app

    def received(self, message: Context) -> None:
        """A task has come without a message that Celery's worker saw."""
        shown = {name: message.get(name) for name in ("root_id", "parent_id", "retries")}
        shown |= {"args": message.get("argsrepr"), "kwargs": message.get("kwargsrepr")}
        times = {"eta": message.get(ETA), "expires": message.get(EXPIRES)}
        self._send("task-received", uuid=message.id, name=message.task, **shown, **times)

    def ended(self, task_id: str, kind: EndKind, reason: str) -> None:
        """It ended without having begun."""
        if kind == "revoked":
            self._send("task-revoked", uuid=task_id, terminated=False, signum=None, expired=reason == "expired")
        else:
            self._send("task-failed", uuid=task_id, exception=f"{kind}: {reason}", traceback="")

    def _send(self, event: str, /, **fields: Any) -> None:
        if self.hostname is None:
            return
        try:
            with self._app.events.default_dispatcher(hostname=self.hostname) as dispatcher:
                dispatcher.send(event, **fields)
        except OperationalError as error:
            log.debug("event_lost", event_type=event, reason=str(error))
