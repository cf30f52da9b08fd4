"""Threads for blocking calls, shared fairly between tenants.

Nothing in this process uses asyncio's default executor: calls that block all threads of one pool stop that kind of call
only, and no tenant can take all threads of a pool while another one waits.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from perllm.broker.api.errors import ApiError

T = TypeVar("T")


class TenantThreadPool:
    """At most `threads` calls at once, `per_tenant` of one tenant; beyond that calls wait, at most `max_waiting` of one
    tenant, and free threads go to the tenants in turn. A call that takes longer than `timeout` s, its wait included, is
    answered with an error (503)."""

    def __init__(self, name: str, *, threads: int, per_tenant: int, max_waiting: int, timeout: float) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"perllm-{name}")
        self._free, self._per_tenant, self._max_waiting, self._timeout = threads, per_tenant, max_waiting, timeout
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # in the order of their turns

    async def run(self, tenant: str, call: Callable[..., T], *arguments: Any) -> T:
        """What the call returns. Raises what it raises, and ApiError where it cannot be made in time. A call given up
        goes on, and holds its thread, to its end."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._acquire(tenant)
                done = asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
                done.add_done_callback(lambda _: self._release(tenant))
                return await asyncio.shield(done)
        except TimeoutError:
            raise ApiError(
                503, "this took too long: try again later", code="unavailable", headers={"Retry-After": "5"}
            ) from None

    async def _acquire(self, tenant: str) -> None:
        """Wait for a thread."""
        if self._free and self._running[tenant] < self._per_tenant:  # then no call waits that could go instead
            self._take(tenant)
            return
        queue = self._waiting.setdefault(tenant, deque())
        if len(queue) >= self._max_waiting:
            raise ApiError(
                429,
                "too many such requests at once: wait for their answers",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(granted)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # granted just then
                self._release(tenant)
            elif granted in queue:
                queue.remove(granted)
                if not queue:
                    self._waiting.pop(tenant, None)
            raise

    def _take(self, tenant: str) -> None:
        self._free -= 1
        self._running[tenant] += 1

    def _release(self, tenant: str) -> None:
        self._free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        for following in list(self._waiting):
            if not self._free:
                return
            queue = self._waiting[following]
            while queue and queue[0].done():
                queue.popleft()
            if queue and self._running[following] < self._per_tenant:
                self._take(following)
                queue.popleft().set_result(None)
                self._waiting.move_to_end(following)
            if not queue:
                del self._waiting[following]

    def close(self) -> None:
        """Take no more calls; those under way end by themselves."""
        self._executor.shutdown(wait=False, cancel_futures=True)
