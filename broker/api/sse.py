"""Server-sent events. Source: WHATWG HTML, section 9.2."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

#: A line for proxies and time-outs, which no client takes for an event.
STILL_HERE = ": still here\n\n"
DONE = "data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> str:
    """One event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


def answer(events: AsyncIterator[str]) -> StreamingResponse:
    """The events as a response."""
    return StreamingResponse(
        events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
