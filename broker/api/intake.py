"""Submissions of many requests in few calls, within each tenant's quota."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from broker.api.errors import ApiError, over_quota
from broker.errors import Unreachable
from broker.ledger import Ledger, weight
from broker.messages import TaskSpec
from broker.settings import Settings

#: Tasks, and bytes of text, that go together, about.
GROUP_TASKS, GROUP_BYTES = 1000, 4 << 20

_Tasks = list[tuple[str, TaskSpec]]


class _Request(NamedTuple):
    tenant: str
    tasks: _Tasks
    size: int  # bytes of text
    stored: asyncio.Future[list[str]]


class Intake:
    """Tasks that come while one call to the ledger is under way go together in the next: a busy server makes few and
    large calls, an idle one answers at once. Tenants take turns."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self._waiting: OrderedDict[str, deque[_Request]] = OrderedDict()  # by tenant, in the order of their turns
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="perllm-intake")
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, tenant: str, tasks: _Tasks) -> list[str]:
        """See Ledger.submit. Raises ApiError where they are more than the tenant may have stored."""
        stored: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        size = sum(spec.text_bytes() for _, spec in tasks)
        self._waiting.setdefault(tenant, deque()).append(_Request(tenant, tasks, size, stored))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return await stored

    async def _send(self) -> None:
        try:
            while self._waiting:
                group = list(self._next())
                outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._store, group)
                for request, outcome in zip(group, outcomes, strict=True):
                    if request.stored.done():
                        continue
                    if isinstance(outcome, Exception):
                        request.stored.set_exception(outcome)
                    else:
                        request.stored.set_result(outcome)
        finally:
            self._sender = None

    def _next(self) -> Iterator[_Request]:
        """What goes together in the next call: of each tenant in turn a request, until it is enough."""
        tasks = size = 0
        while self._waiting and tasks < GROUP_TASKS and size < GROUP_BYTES:
            tenant, queue = next(iter(self._waiting.items()))
            request = queue.popleft()
            if queue:
                self._waiting.move_to_end(tenant)
            else:
                del self._waiting[tenant]
            if not request.stored.done():  # whose client still waits
                tasks, size = tasks + len(request.tasks), size + request.size
                yield request

    def _store(self, group: list[_Request]) -> list[list[str] | Exception]:
        """What became of each request: its ids, or its error. One request's error is no other's."""
        try:
            refused = self._over_quota(group)
            fitting = [request for request in group if id(request) not in refused]
            ids = iter(self._ledger.submit(task for request in fitting for task in request.tasks))
            return [refused.get(id(r)) or list(islice(ids, len(r.tasks))) for r in group]
        except Unreachable as error:
            return [error for _ in group]
        except Exception as error:
            if len(group) == 1:
                return [error]
            return [outcome for request in group for outcome in self._store([request])]

    def _over_quota(self, group: list[_Request]) -> dict[int, ApiError]:
        tenants = list(dict.fromkeys(request.tenant for request in group))
        held = dict(zip(tenants, self._ledger.stored_bytes(tenants), strict=True))
        refused = {}
        for request in group:
            most = self._settings.quota(request.tenant).task_bytes
            size = sum(weight(spec) for _, spec in request.tasks)
            if held[request.tenant] + size > most:
                refused[id(request)] = over_quota(
                    f"the tasks of this tenant, finished ones and results included, may take {most} bytes, and take "
                    f"{held[request.tenant]}: delete some (DELETE /v1/tasks/ID), or wait until finished ones are "
                    f"forgotten, {self._settings.retention:g} s after their end"
                )
            else:
                held[request.tenant] += size
        return refused
