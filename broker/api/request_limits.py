"""Bounds on requests and connections: on the bytes of each body and of all together, on the time a request may take to
come in and its answer to be read, and on the number of connections."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from perllm.broker.api.errors import ApiError, error_body, refuse
from perllm.broker.api.request_ids import HEADER, new_request_id
from perllm.broker.api.settings import ApiSettings

#: Bytes a second at which a body must come, beyond PERLLM_API_PATIENCE seconds that each request has.
MIN_BODY_RATE = 100_000
#: Bytes a multipart body may have beyond its file.
MULTIPART_OVERHEAD = 64 << 10
#: Most bytes of a request's head.
MAX_HEAD = 32 << 10
#: Methods there are; a request with another is answered at once, and counted as one of "other".
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
#: One caller may take one part in so many of the memory for bodies.
MEMORY_SHARES = 4
#: Seconds a connection stays open after an answer that was given before its request was whole, so that the client can
#: read it.
LINGER_TIME = 2.0
#: Seconds a client may leave what is sent to it unread.
UNREAD_TIMEOUT = 60.0
#: The key of the ASGI scope under which the caller's name is written, once it is known, for bodies to be counted by.
CALLER = "perllm.caller"


class RequestLimits:
    """ASGI middleware: bounds each body's size, the time it takes to come in, and the memory of all bodies that are
    being read or worked on, together and by caller."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app, self._settings = app, settings
        self._held: Counter[str] = Counter()  # bytes, by caller
        self._total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        s = self._settings
        if scope["method"] not in METHODS:
            await refuse(send, 405, "no such method")
            return
        if s.api_open and (reason := _foreign_page(scope, s.api_cors)):
            await refuse(send, 403, reason)
            return
        upload = scope["method"] == "POST" and scope["path"] == "/v1/files"
        most = s.api_max_file + MULTIPART_OVERHEAD if upload else s.api_max_body
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(length) > most:
            await refuse(send, 413, f"the body has more than {most} bytes")
            return
        began, seen, held, whole, caller = time.monotonic(), 0, 0, False, ""

        async def limited() -> Message:
            nonlocal seen, held, whole, caller
            if whole:  # all that may follow is that the client has disconnected
                return await receive()
            left = began + s.api_patience + seen / MIN_BODY_RATE - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > most:
                raise ApiError(413, f"the body has more than {most} bytes", headers={"Connection": "close"})
            if not upload:  # which goes to the disk
                caller = scope.get(CALLER, caller)
                self._hold(caller, len(message.get("body", b"")))
                held += len(message.get("body", b""))
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._total -= held
            self._held[caller] -= held
            if self._held[caller] <= 0:
                del self._held[caller]

    def _hold(self, caller: str, size: int) -> None:
        """Count bytes in. Raises ApiError where there is no room for them."""
        most = self._settings.api_body_memory
        most_of_one = max(most // MEMORY_SHARES, self._settings.api_max_body)
        if self._total + size > most or self._held[caller] + size > most_of_one:
            retry = {"Retry-After": "1", "Connection": "close"}
            raise ApiError(503, "too much is being received now: try again", code="unavailable", headers=retry)
        self._total += size
        self._held[caller] += size


def _foreign_page(scope: Scope, origins: Sequence[str]) -> str | None:
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


class LimitedProtocol(H11Protocol):
    """Uvicorn's HTTP protocol with bounds on connections: how many there are, in all and from one address; how long
    the head of a request takes to come; how long the rest of a request takes that was answered early, and how long
    answers stay unread."""

    head_timeout = 20.0
    max_connections = 4096
    max_connections_per_address = 1024
    _open: ClassVar[Counter[str]] = Counter()  # connections by address
    _head_due: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _address: str | None = None  # as it is counted

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if len(self.connections) > self.max_connections or self._open[address] >= self.max_connections_per_address:
            self.connections.discard(self)
            transport.write(_too_many())
            transport.close()
            self._await_end(transport)
            return
        self._address = address
        self._open[address] += 1
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self._address is None or self._linger is not None:  # it is read no longer
            return
        super().data_received(data)
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_body(400, f"this is no HTTP request: {msg}")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (HEADER, new_request_id().encode()),
            (b"connection", b"close"),
        ]
        events = (
            h11.Response(status_code=400, reason=b"Bad Request", headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_due, self._linger, self._unread):
            if timer is not None:
                timer.cancel()
        self._head_due = self._linger = self._unread = None
        if self._address is not None:
            self._open[self._address] -= 1
            if not self._open[self._address]:
                del self._open[self._address]
            self._address = None
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # A request answered before it was whole: the rest of it is not read, and may come for ever.
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._linger = self.loop.call_later(LINGER_TIME, self.transport.abort)
            with suppress(OSError, RuntimeError):
                self.transport.write_eof()  # after the answer

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(UNREAD_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_end(self.transport)

    def _await_end(self, transport: asyncio.Transport) -> None:
        """Closing waits until the answer is sent, which the client may never read."""
        self._linger = self.loop.call_later(LINGER_TIME, transport.abort)

    def _watch_head(self) -> None:
        """The time-out runs while a head is awaited: on a new connection, and once one has begun on an old one."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch_head()
        elif self._head_due is None:
            self._head_due = self.loop.call_later(self.head_timeout, self._close_without_head)

    def _unwatch_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _close_without_head(self) -> None:
        self._head_due = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
            self._await_end(self.transport)


def _too_many() -> bytes:
    body = json.dumps(error_body(503, "too many connections: try again later", code="unavailable")).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    name = b"%s: %s\r\n" % (HEADER, new_request_id().encode())
    return head.encode() + name + b"retry-after: 5\r\nconnection: close\r\n\r\n" + body
