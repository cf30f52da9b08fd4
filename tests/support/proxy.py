"""A network that can be made bad: a TCP proxy before a real server.

TCP hands bytes on in order or not at all, so there is no reordering to make; what a bad network can do to a connection
is slowness, silence, and an end.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit, urlunsplit

from support.ports import free_port


class Proxy:
    """Listens on a loopback port and connects to the server of `url`, until the block is left."""

    def __init__(self, url: str) -> None:
        self.port = free_port()
        self._url = urlsplit(url)
        self._delay = 0.0
        self._flows = asyncio.Event()
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        """The server's URL by way of this proxy."""
        login, at, _ = self._url.netloc.rpartition("@")
        return urlunsplit(("redis", f"{login}{at}127.0.0.1:{self.port}", "/0", "", ""))

    # --- faults

    def delay(self, seconds: float) -> None:
        """Every byte takes so long, each way."""
        self._delay = seconds

    def hold(self) -> None:
        """Nothing passes until `let_through`, when everything does: packets lost and sent again."""
        self._do(self._flows.clear)

    def let_through(self) -> None:
        self._do(self._flows.set)

    def forget(self) -> None:
        """The connections there are lead nowhere from now on, and nobody is told (half-open); new ones work."""

        def forget() -> None:
            for link in self._links:
                link.forgotten = True

        self._do(forget)

    def reset(self) -> None:
        """The connections there are end at once, by RST."""

        def reset() -> None:
            for link in list(self._links):
                link.reset()

        self._do(reset)

    def down(self) -> None:
        """Nobody listens, and the connections there are end."""

        def close() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None

        self._do(close)
        self.reset()

    def up(self) -> None:
        """Somebody listens again."""
        self._await(self._listen)

    # --- the machinery

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._url.scheme == "unix":
                there = await asyncio.open_unix_connection(unquote(self._url.path))
            else:
                there = await asyncio.open_connection(self._url.hostname, self._url.port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, there[1])
        self._links.add(link)
        await asyncio.gather(self._pass(reader, there[1], link), self._pass(there[0], writer, link))
        self._links.discard(link)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        while True:
            try:
                data = await reader.read(1 << 16)
            except OSError:
                data = b""
            await self._flows.wait()
            if link.forgotten:
                if not data:
                    return
                continue
            act = (lambda d=data: writer.write(d)) if data else writer.close
            if self._delay:
                self._loop.call_later(self._delay, act)
            else:
                act()
            if not data:
                return

    def _do(self, what: Callable[[], object]) -> None:
        async def do() -> None:
            what()

        self._await(do)

    def _await(self, what: Callable[[], Awaitable[None]]) -> None:
        async def do() -> None:
            await what()

        asyncio.run_coroutine_threadsafe(do(), self._loop).result(30)

    def __enter__(self) -> Self:
        self._thread.start()
        self._flows.set()
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def ended() -> None:
            while self._links:
                await asyncio.sleep(0.01)

        self.let_through()
        self.down()
        self._await(ended)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Link:
    """One connection through the proxy."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self.forgotten = False

    def reset(self) -> None:
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            with suppress(OSError):  # it may have ended by itself
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
