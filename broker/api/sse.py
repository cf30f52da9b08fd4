"""Server-sent events. Source: WHATWG HTML, section 9.2."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

#: A comment: it keeps proxies from closing a silent connection, and no client takes it for an event.
HEARTBEAT = ": still here\n\n"
DONE = "data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> str:
    """One event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


def answer(events: AsyncIterator[str], slot: ExitStack) -> StreamingResponse:
    """The events as a response; the slot is released when it is over, however it ends."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _Events(events, slot, headers)


class _Events(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], slot: ExitStack, headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._events, self._slot = events, slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot:
            await super().__call__(scope, receive, send)
