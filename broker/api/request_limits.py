"""What no request may do: send more than it may, or take for ever to send it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from perllm.broker.api.errors import ApiError, document
from perllm.broker.settings import Settings

#: Bytes a second a body must come at, beyond the patience with each request.
SLOWEST = 100_000
#: Bytes a multipart body may have beyond its file.
ENVELOPE = 64 << 10
#: Most bytes of a request's head.
MAX_HEAD = 32 << 10


class RequestLimits:
    """ASGI middleware: bounds each body's size, and the time it takes to come in."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        s = self._settings
        if s.api_open and (stranger := _stranger(scope, s.api_cors)):
            await _refuse(send, 403, stranger)
            return
        upload = scope["method"] == "POST" and scope["path"] == "/v1/files"
        most = s.api_max_file + ENVELOPE if upload else s.api_max_body
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(length) > most:
            await _refuse(send, 413, f"the body has more than {most} bytes")
            return
        began, seen, whole = time.monotonic(), 0, False

        async def guarded() -> Message:
            nonlocal seen, whole
            if whole:  # from here on it is only to hear that the client has gone
                return await receive()
            left = began + s.api_patience + seen / SLOWEST - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > most:
                raise ApiError(413, f"the body has more than {most} bytes", headers={"Connection": "close"})
            return message

        await self._app(scope, guarded, send)


def _stranger(scope: Scope, origins: Sequence[str]) -> str | None:
    """Why a request cannot come from this machine's user, where no key says so: some page in a browser may send it, or
    have its own name resolve to 127.0.0.1 (DNS rebinding)."""
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1")
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if name not in ("localhost", "127.0.0.1", "[::1]"):
        return f"without keys (PERLLM_API_OPEN) this is localhost, not {name[:80]!r}"
    origin = headers.get(b"origin", b"").decode("latin-1")
    if origin and origin not in (f"http://{host}", *origins):
        return f"without keys (PERLLM_API_OPEN) pages of {origin[:80]!r} have no access: PERLLM_API_CORS lets them in"
    return None


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(document(status, message)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Protocol(H11Protocol):
    """Uvicorn's HTTP protocol with a bound on the time a request's head takes to come."""

    patience = 20.0
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The clock runs while a head is awaited: on a new connection, and once one has begun on an old one."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._head_due is None:
            self._head_due = self.loop.call_later(self.patience, self._give_up)

    def _unwatch(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _give_up(self) -> None:
        self._head_due = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
