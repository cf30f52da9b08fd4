"""Stores the tasks of many requests in few calls to the ledger, within each tenant's quota."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import structlog

from perllm.broker.api.errors import ApiError, over_quota
from perllm.broker.api.settings import ApiSettings
from perllm.broker.errors import InvalidTask, Unreachable
from perllm.broker.ledger import Entry, Ledger, Stored, entry
from perllm.broker.messages import TaskSpec

#: Tasks, and bytes of text, that go together, about.
GROUP_TASKS, GROUP_BYTES = 1000, 4 << 20

_Tasks = list[tuple[str, TaskSpec]]


class _Request(NamedTuple):
    tenant: str
    tasks: _Tasks
    size: int  # bytes of text
    stored: asyncio.Future[list[Stored]]


log = structlog.get_logger(__name__)


class SubmitCoalescer:
    """Tasks that come while one call to the ledger is under way go together in the next: a busy server makes few and
    large calls, an idle one answers at once. Tenants take turns. What is wrong with one request's tasks is no other's
    concern."""

    def __init__(self, settings: ApiSettings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self._waiting: OrderedDict[str, deque[_Request]] = OrderedDict()  # by tenant, in the order of their turns
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="perllm-submit")
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, tenant: str, tasks: _Tasks) -> list[Stored]:
        """See Ledger.store. Raises ApiError where they are more than the tenant may have stored, and InvalidTask."""
        stored: asyncio.Future[list[Stored]] = asyncio.get_running_loop().create_future()
        try:
            size = sum(spec.text_bytes() for _, spec in tasks)
        except UnicodeEncodeError as error:
            raise InvalidTask(f"task: it cannot be written: {error}") from None
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

    def _store(self, group: list[_Request]) -> list[list[Stored] | Exception]:
        """What became of each request: its tasks, or its error."""
        try:
            outcomes: dict[int, list[Stored] | Exception] = {}
            written: dict[int, list[Entry]] = {}
            for number, request in enumerate(group):
                try:
                    written[number] = [entry(task_id, spec) for task_id, spec in request.tasks]
                except InvalidTask as error:
                    outcomes[number] = error
            outcomes |= self._over_quota(group, written)
            fitting = {number: entries for number, entries in written.items() if number not in outcomes}
            outcomes |= self._stored(fitting)
            return [outcomes[number] for number in range(len(group))]
        except Exception as error:
            return [error for _ in group]

    def _stored(self, requests: dict[int, list[Entry]]) -> dict[int, list[Stored] | Exception]:
        try:
            stored = iter(self._ledger.store(each for entries in requests.values() for each in entries))
            return {number: list(islice(stored, len(entries))) for number, entries in requests.items()}
        except Unreachable:
            raise
        except Exception as error:
            if len(requests) == 1:
                return dict.fromkeys(requests, error)
            log.exception("submissions_apart", requests=len(requests), reason=str(error))  # the same ids do no harm
            return {n: outcome for n, e in requests.items() for outcome in self._stored({n: e}).values()}

    def _over_quota(self, group: list[_Request], written: dict[int, list[Entry]]) -> dict[int, ApiError]:
        tenants = list(dict.fromkeys(request.tenant for request in group))
        held = dict(zip(tenants, self._ledger.stored_bytes(tenants), strict=True))
        refused = {}
        for number, entries in written.items():
            tenant = group[number].tenant
            most = self._settings.quota(tenant).task_bytes
            size = sum(one.size for one in entries)
            if held[tenant] + size > most:
                refused[number] = over_quota(
                    f"the tasks of this tenant, finished ones and results included, may take {most} bytes, and take "
                    f"{held[tenant]}: delete some (DELETE /v1/tasks/ID), or wait until finished ones are "
                    f"forgotten, {self._settings.retention:g} s after their end"
                )
            else:
                held[tenant] += size
        return refused
