"""What the ledger announces, heard on one connection by all who wait for something in this process.

An announcement is a hint: some are lost with a connection. Who waits looks for himself every so often.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import redis
import redis.asyncio

from perllm.broker.connection import connect_async

if TYPE_CHECKING:  # loaded when settings are read: half of what importing a client would take
    from perllm.broker.settings import Settings

#: Seconds for which who listens waits until the server has been asked to tell; and between tries to ask.
PATIENCE = 1.0
#: Seconds after which the connection is looked at though nothing came.
_IDLE = 5.0
#: Channels per SUBSCRIBE.
_CHUNK = 1000

#: Called with the channel on which something was announced.
Bell = Callable[[str], None]


class Announcements:
    """For asyncio, and one event loop: bells are rung in it. The connection is opened when the first listens, and stays
    open until `close`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bells: dict[str, set[Bell]] = {}  # by channel
        self._wanted: dict[str, bool] = {}  # channels to subscribe to, or (False) no longer …
        self._asked = asyncio.Event()  # … and whether the server has been asked for these
        self._unasked: dict[str, asyncio.Event] = {}  # the same for each channel, until it has
        self._changed, self._subscribed = asyncio.Event(), asyncio.Event()
        self._subscription: redis.asyncio.client.PubSub | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def listen(self, bell: Bell, channels: Collection[str]) -> None:
        """Ring `bell` for what is announced on these channels. When this returns, the server has been asked to tell; or
        it cannot be asked now, and will be when it can."""
        for channel in channels:
            if channel not in self._bells:
                self._bells[channel] = set()
                self._wanted[channel] = True
                self._unasked[channel] = self._asked
                self._changed.set()
            self._bells[channel].add(bell)
        if self._subscription is None:
            self._subscription = connect_async(self._settings).pubsub(ignore_subscribe_messages=True)
            self._tasks = [
                asyncio.create_task(self._subscribe_as_wanted(self._subscription)),
                asyncio.create_task(self._hear(self._subscription)),
            ]
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for channel in channels:
                    while unasked := self._unasked.get(channel):
                        await unasked.wait()

    def forget(self, bell: Bell, channels: Collection[str]) -> None:
        """Ring it no more."""
        for channel in channels:
            bells = self._bells.get(channel)
            if bells is None:
                continue
            bells.discard(bell)
            if not bells:
                del self._bells[channel]
                self._wanted[channel] = False
                self._changed.set()

    async def _subscribe_as_wanted(self, subscription: redis.asyncio.client.PubSub) -> None:
        """What many want at once goes together."""
        while not self._closed:
            await self._changed.wait()
            self._changed.clear()
            wanted, asked = self._wanted, self._asked
            self._wanted, self._asked = {}, asyncio.Event()
            try:
                for want, ask in (True, subscription.subscribe), (False, subscription.unsubscribe):
                    channels = [channel for channel, wants in wanted.items() if wants is want]
                    for start in range(0, len(channels), _CHUNK):
                        await ask(*channels[start : start + _CHUNK])
            except redis.exceptions.RedisError:
                self._wanted = wanted | self._wanted
                self._unasked |= dict.fromkeys(wanted.keys() & self._unasked.keys(), self._asked)
                self._changed.set()
                await asyncio.sleep(PATIENCE)
            else:
                self._unasked = {channel: event for channel, event in self._unasked.items() if event is not asked}
                self._subscribed.set()
            asked.set()

    async def _hear(self, subscription: redis.asyncio.client.PubSub) -> None:
        while not self._closed:
            if not subscription.subscribed:
                self._subscribed.clear()
                await self._subscribed.wait()
            try:
                message = await subscription.get_message(timeout=_IDLE)
            except redis.exceptions.RedisError:
                await asyncio.sleep(PATIENCE)
                continue
            if message is not None:
                channel = message["channel"].decode()
                for bell in tuple(self._bells.get(channel, ())):
                    bell(channel)

    async def close(self) -> None:
        """Close the connection."""
        self._closed = True
        for task in self._tasks:
            task.cancel()  # which redis-py has been seen to swallow
        for event in (self._changed, self._subscribed):
            event.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=PATIENCE)
        if self._subscription is not None:
            await self._subscription.aclose()  # type: ignore[no-untyped-call]


class ThreadedAnnouncements:
    """The same for threads. Bells are rung in a thread of its own, which begins when the first listens."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._thread: _Thread | None = None

    def listen(self, bell: Bell, channels: Collection[str]) -> None:
        """See Announcements.listen."""
        with self._lock:
            if self._thread is None or self._thread.process != os.getpid():
                self._thread = _Thread(self._settings)
                weakref.finalize(self, self._thread.end)  # also where nobody closes it
            thread = self._thread
        thread.run(lambda announcements: announcements.listen(bell, channels))

    def forget(self, bell: Bell, channels: Collection[str]) -> None:
        """See Announcements.forget."""

        async def forget(announcements: Announcements) -> None:
            announcements.forget(bell, channels)

        if self._thread is not None:
            self._thread.run(forget)

    def close(self) -> None:
        """Close the connection."""
        if self._thread is not None:
            self._thread.end()
            self._thread = None


class _Thread:
    """A thread with an event loop and its announcements. A process that was forked has it not."""

    def __init__(self, settings: Settings) -> None:
        self.process = os.getpid()
        self._announcements = Announcements(settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="perllm-announcements", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def run(self, do: Callable[[Announcements], Coroutine[Any, Any, None]]) -> None:
        """Have it do this; not for long, and not at all where it has ended."""
        if not self._loop.is_closed():
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(do(self._announcements), self._loop).result(2 * PATIENCE)

    def end(self) -> None:
        """End it. Idempotent."""

        async def end() -> None:
            await self._announcements.close()
            self._loop.stop()

        here = threading.current_thread() is self._thread
        if self.process == os.getpid() and self._thread.is_alive() and not here:
            asyncio.run_coroutine_threadsafe(end(), self._loop)
            self._thread.join(PATIENCE)
