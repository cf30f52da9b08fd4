"""Requests that last: those that wait for a result, stream it, or upload a file. How many there may be at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import structlog
from fastapi import Request

from perllm.broker.api.callers import Caller
from perllm.broker.api.errors import ApiError
from perllm.broker.api.stopping import Stopping
from perllm.broker.api.submission import Accepted
from perllm.broker.api.time_limit import lift_time_limit
from perllm.broker.client import AsyncClient
from perllm.broker.errors import PerLLMError, Unreachable
from perllm.broker.messages import Result

#: Seconds beyond a task's deadline, and a lease, that its result may take to be there.
RESULT_GRACE = 3.0
#: Seconds of silence after which a stream sends a heartbeat.
HEARTBEAT_INTERVAL = 15.0

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Stopped(PerLLMError):
    """This process stops before an answer is whole."""


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

    def __init__(self, client: AsyncClient, stopping: Stopping) -> None:
        self._client, self._stopping = client, stopping
        self._cancellations: set[asyncio.Task[Any]] = set()

    async def wait(self, accepted: Accepted, request: Request) -> Result:
        """The result, once there is one. When the client goes away meanwhile, or this process is to stop, the task is
        abandoned. Raises ApiError, WaitTimeout."""
        return (await self.wait_for_all([accepted], request))[0]

    async def wait_for_all(self, accepted: Sequence[Accepted], request: Request) -> list[Result]:
        """The same for the tasks of one request, in order, once all have theirs."""
        lift_time_limit(request.scope)
        beyond = self._client.settings.lease + RESULT_GRACE
        waits = [asyncio.create_task(self._client.result(each.id, each.spec.deadline + beyond)) for each in accepted]
        disconnected = asyncio.create_task(_disconnect(request))
        stopping = asyncio.create_task(self._stopping.now.wait())
        try:
            results = asyncio.gather(*waits)
            first: set[asyncio.Future[Any]] = {results, disconnected, stopping}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if results.done():
                return results.result()
            for each in accepted:
                self.abandon(each)
            if stopping.done():
                raise ApiError(503, "this server stops: try again", code="unavailable", headers={"Retry-After": "1"})
            raise ApiError(499, "the client went away")
        except Unreachable as error:
            log.error("ledger_unreachable", reason=str(error))
            raise ApiError(
                504,
                "the queue cannot be reached, so what became of the task is not known",
                code="timeout",
                headers={"X-Should-Retry": "false"},
                more={"task_id": accepted[0].id},
            ) from None
        finally:
            for task in (*waits, disconnected, stopping):
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


async def with_heartbeats(
    source: AsyncIterator[T], stopping: Stopping, every: float = HEARTBEAT_INTERVAL
) -> AsyncIterator[T | None]:
    """What the source gives, and None whenever it gave nothing for so long, s. Raises Stopped when this process stops
    before that ends."""
    following: asyncio.Future[T] | None = None
    stop: asyncio.Future[Any] = asyncio.ensure_future(stopping.now.wait())
    try:
        while True:
            following = following or _next(source)
            awaited: set[asyncio.Future[Any]] = {following, stop}
            await asyncio.wait(awaited, timeout=every, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                if stop.done():
                    raise Stopped("this server stops")
                yield None
                continue
            try:
                item = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield item
    finally:
        stop.cancel()
        if following is not None:
            following.cancel()
