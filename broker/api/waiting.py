"""Requests that last: those that wait for a result, stream it, or upload a file. How many there may be at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

from fastapi import Request

from perllm.broker.api.callers import Caller
from perllm.broker.api.errors import ApiError
from perllm.broker.api.submission import Accepted
from perllm.broker.client import AsyncClient
from perllm.broker.messages import Result

#: Seconds beyond a task's deadline that its result may take to be there.
RESULT_GRACE = 30.0
#: Seconds of silence after which a stream sends a heartbeat.
HEARTBEAT_INTERVAL = 15.0

T = TypeVar("T")


class ConcurrencyLimit:
    """At most `limit` of one kind of thing at once, `per_caller` of one caller."""

    def __init__(self, limit: int, per_caller: int, kind: str) -> None:
        self._limit, self._per_caller, self._kind = limit, per_caller, kind
        self._taken: Counter[str] = Counter()

    def slot(self, caller: Caller, size: int = 1) -> ExitStack:
        """So many of them, taken until the stack is closed. Raises ApiError where they are not free."""
        name, headers = caller.name, {"Retry-After": "5"}
        if self._taken[name] + size > self._per_caller:
            message = f"{self._per_caller} {self._kind} at once with this key: end one of them"
            raise ApiError(429, message, code="too_many_requests", headers=headers)
        if self._taken.total() + size > self._limit:
            raise ApiError(503, f"too many {self._kind} at once: try again", code="unavailable", headers=headers)
        self._taken[name] += size
        slot = ExitStack()
        slot.callback(self._release, name, size)
        return slot

    def _release(self, name: str, size: int) -> None:
        self._taken[name] -= size
        if not self._taken[name]:
            del self._taken[name]


class Results:
    """Waits for tasks' results, and cancels tasks of which the client has gone away."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._cancellations: set[asyncio.Task[Any]] = set()

    async def wait(self, accepted: Accepted, request: Request) -> Result:
        """The result, once there is one. When the client goes away meanwhile, the task is abandoned. Raises ApiError,
        WaitTimeout."""
        return (await self.wait_for_all([accepted], request))[0]

    async def wait_for_all(self, accepted: Sequence[Accepted], request: Request) -> list[Result]:
        """The same for the tasks of one request, in order, once all have theirs."""
        waits = [
            asyncio.create_task(self._client.result(each.id, each.spec.deadline + RESULT_GRACE)) for each in accepted
        ]
        disconnected = asyncio.create_task(_disconnect(request))
        try:
            results = asyncio.gather(*waits)
            both: set[asyncio.Future[Any]] = {results, disconnected}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if results.done():
                return results.result()
            for each in accepted:
                self.abandon(each)
            raise ApiError(499, "the client went away")
        finally:
            for task in (*waits, disconnected):
                task.cancel()

    def abandon(self, accepted: Accepted) -> None:
        """The client that waited has gone: cancel its task, unless it can come back for it."""
        if accepted.spec.idempotency_key is None:
            cancellation = asyncio.create_task(self._client.cancel(accepted.id))
            self._cancellations.add(cancellation)
            cancellation.add_done_callback(self._cancellations.discard)

    async def close(self) -> None:
        """Let cancellations end."""
        if self._cancellations:
            await asyncio.wait(self._cancellations, timeout=5)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """What any of the sources gives, as it comes, with the source's number."""
    following = {_next(source): number for number, source in enumerate(sources)}
    try:
        while following:
            done, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = following.pop(future)
                try:
                    item = future.result()
                except StopAsyncIteration:
                    continue
                following[_next(sources[number])] = number
                yield number, item
    finally:
        for future in following:
            future.cancel()


def _next(source: AsyncIterator[T]) -> asyncio.Future[T]:
    return asyncio.ensure_future(cast("Coroutine[Any, Any, T]", anext(source)))


async def with_heartbeats(source: AsyncIterator[T], every: float = HEARTBEAT_INTERVAL) -> AsyncIterator[T | None]:
    """What the source gives, and None whenever it gave nothing for so long, s."""
    following: asyncio.Future[T] | None = None
    try:
        while True:
            following = following or _next(source)
            done, _ = await asyncio.wait({following}, timeout=every)
            if not done:
                yield None
                continue
            try:
                item = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield item
    finally:
        if following is not None:
            following.cancel()
