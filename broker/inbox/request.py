"""How the inbox's worker takes a message in: as one that has come, and not to be held back here.

Celery's own workers keep a message with an `eta` in their memory until it is due, and take another: a million of them
would all be there, and be delivered a second time after a minute. Here the ledger keeps the task, and the scheduler
knows from when on it may start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.request import Request
from celery.worker.strategy import default

#: Where a message's times are put, out of Celery's sight.
ETA, EXPIRES = "perllm_eta", "perllm_expires"


def strategy(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """Celery's, for messages without times."""
    handle = default(task, app, consumer, **options)

    def take(message: Any, body: Any, *rest: Any, **named: Any) -> Any:
        headers = message.headers
        for sent in (headers, message.payload if "task" not in headers else None):
            if isinstance(sent, dict):
                _put_aside(sent, headers)
        return handle(message, body, *rest, **named)

    return take


def _put_aside(sent: dict[str, Any], headers: dict[str, Any]) -> None:
    for name, aside in (("eta", ETA), ("expires", EXPIRES)):
        if sent.get(name) is not None:
            headers[aside] = sent.pop(name)


class Arrival(Request):  # type: ignore[misc]
    """Celery's, which tells Flower only that the task has come: it starts on a node."""

    def send_event(self, type: str, **fields: Any) -> None:
        if type != "task-started":
            super().send_event(type, **fields)
