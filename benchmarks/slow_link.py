"""A link with a long way: a TCP proxy before a Redis server that hands every byte on after a while, in both directions.
Its bandwidth is unlimited and it loses nothing, so what is slower through it is slower by round trips alone.

    python -m benchmarks.slow_link unix:///run/valkey.sock --port 7777 --delay 0.015      # 30 ms there and back

A process of its own, as it would take turns with what is measured in one.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

from benchmarks.common import child
from perllm.broker.connection import connect
from perllm.broker.settings import Settings


@contextmanager
def slow_link(url: str, port: int, round_trip: float, log: Path) -> Iterator[str]:
    """A link to the server of `url` that takes `round_trip` s there and back, for as long as the block; gives the URL
    by way of it."""
    command = [sys.executable, "-m", "benchmarks.slow_link", url, "--port", str(port), "--delay", str(round_trip / 2)]
    with child(log, command):
        there = f"redis://127.0.0.1:{port}/0"
        with connect(Settings(redis_url=there)) as client:  # type: ignore[arg-type]
            client.ping()
        yield there


class _Way(asyncio.Protocol):
    """One direction of a connection. What is read here is written there, `delay` s later."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._held: deque[tuple[float, bytes]] = deque()  # until when, in order; no bytes: the end
        self._loop = asyncio.get_running_loop()
        self._out: asyncio.Transport | None = None
        self._waking = False

    def lead_to(self, out: asyncio.Transport) -> None:
        """What was read before is on its way, too."""
        self._out = out
        self._hand_on()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._delay == 0 and self._out is not None:
            self._out.write(data)
            return
        self._held.append((self._loop.time() + self._delay, data))
        if not self._waking:
            self._waking = True
            self._loop.call_later(self._delay, self._hand_on)

    def connection_lost(self, _: Exception | None) -> None:
        self.data_received(b"")

    def _hand_on(self) -> None:
        if self._out is None:
            return
        self._waking = False
        now = self._loop.time()
        while self._held and self._held[0][0] <= now:
            data = self._held.popleft()[1]
            if data:
                self._out.write(data)
            else:
                self._out.close()
        if self._held:
            self._waking = True
            self._loop.call_at(self._held[0][0], self._hand_on)


async def _serve(url: str, port: int, delay: float) -> None:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()

    async def join(here: _Way) -> None:
        there = _Way(delay)
        if parts.scheme == "unix":
            made, _ = await loop.create_unix_connection(lambda: there, unquote(parts.path))
        else:
            made, _ = await loop.create_connection(lambda: there, parts.hostname, parts.port)
        here.lead_to(made)
        there.lead_to(here.transport)

    class Accepted(_Way):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            joins.add(task := loop.create_task(join(self)))
            task.add_done_callback(joins.discard)

    joins: set[asyncio.Task[None]] = set()
    server = await loop.create_server(lambda: Accepted(delay), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server's")
    parser.add_argument("--port", type=int, required=True, help="where to listen, on the loopback")
    parser.add_argument("--delay", type=float, required=True, help="s, each way")
    options = parser.parse_args()
    asyncio.run(_serve(options.url, options.port, options.delay))


if __name__ == "__main__":
    main()
