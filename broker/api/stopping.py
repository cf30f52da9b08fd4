"""How the API stops: requests that are under way may end, new ones are told when to come again."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from perllm.broker.api.errors import refuse

#: Seconds that requests told of the end have to say so to their clients, before their connections are cut.
LAST_WORDS = 3
#: Paths answered to the end: whoever watches is to see it.
WATCHED = frozenset(("/health", "/ready", "/metrics"))


class Stopping:
    """Whether this process is about to stop, and what is still under way. `now` is set when that has to end, too."""

    def __init__(self, grace: float) -> None:
        self.now = asyncio.Event()
        self._grace = grace
        self._until: float | None = None
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def begun(self) -> bool:
        """Whether nothing new is taken."""
        return self._until is not None

    async def end_requests(self) -> None:
        """Take nothing new; return when nothing is under way any more, or what is has been told to end."""
        self._until = time.monotonic() + self._grace
        with suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                await self._idle.wait()
        self.now.set()

    def retry_after(self) -> int:
        """Seconds after which another process should be here."""
        left = self._until - time.monotonic() if self._until is not None else 0.0
        return max(1, math.ceil(left + 1))

    def note_begin(self) -> None:
        """A request is under way."""
        self._under_way += 1
        self._idle.clear()

    def note_end(self) -> None:
        """One has ended."""
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()


class RefuseWhileStopping:
    """ASGI middleware: counts requests, and refuses new ones once the process is about to stop."""

    def __init__(self, app: ASGIApp, stopping: Stopping) -> None:
        self._app, self._stopping = app, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in WATCHED:
            await self._app(scope, receive, send)
            return
        if self._stopping.begun:
            await refuse(send, 503, "this server is about to stop: try again", retry_after=self._stopping.retry_after())
            return
        self._stopping.note_begin()
        try:
            await self._app(scope, receive, send)
        finally:
            self._stopping.note_end()


class Server(uvicorn.Server):
    """Uvicorn's, which goes on listening while requests end, so that new ones are refused with a reason."""

    def __init__(self, config: uvicorn.Config, stopping: Stopping) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See Uvicorn's. A second signal ends it at once."""
        ending = asyncio.create_task(self._stopping.end_requests())
        while not ending.done() and not self.force_exit:
            await asyncio.wait({ending}, timeout=0.1)
        self._stopping.now.set()
        ending.cancel()
        await super().shutdown(sockets)
