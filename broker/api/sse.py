"""Server-sent events. Source: WHATWG HTML, section 9.2."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

#: A line for proxies and time-outs, which no client takes for an event.
STILL_HERE = ": still here\n\n"
DONE = "data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> str:
    """One event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


def answer(events: AsyncIterator[str], seat: ExitStack) -> StreamingResponse:
    """The events as a response; the seat is given back when it is over, however it ends."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _Events(events, seat, headers)


class _Events(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], seat: ExitStack, headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._events, self._seat = events, seat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._seat:
            await super().__call__(scope, receive, send)
