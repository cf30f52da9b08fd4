"""From a request to a task in the ledger, and the tasks of a caller's tenant."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from perllm.broker.api.callers import Caller
from perllm.broker.api.errors import ApiError, not_found
from perllm.broker.api.keys import Keys
from perllm.broker.api.request_ids import origin
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.submit_coalescer import SubmitCoalescer
from perllm.broker.api.threads import TenantThreadPool
from perllm.broker.client import AsyncClient
from perllm.broker.errors import InvalidTask
from perllm.broker.ledger import TaskRecord
from perllm.broker.messages import TaskSpec, new_id
from perllm.broker.openai.sampling import as_asked
from perllm.broker.openai.translation import seconds_left

#: Longest id looked up, characters.
MAX_ID = 256

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A task in the ledger. `repeated`: it was there before, under the same idempotency key."""

    id: str
    spec: TaskSpec
    submitted: float
    repeated: bool = False


class Tasks:
    """Checks, submits and finds tasks."""

    def __init__(self, settings: ApiSettings, client: AsyncClient, keys: Keys, pool: TenantThreadPool) -> None:
        self._client, self._ledger, self._keys, self._pool = client, client.ledger, keys, pool
        self._coalescer = SubmitCoalescer(settings, client.ledger)

    async def accept(
        self, caller: Caller, fields: Mapping[str, Any], *, given: Collection[str] | None = None
    ) -> TaskSpec:
        """The checked task of this caller. Raises ApiError, and InvalidTask, which speaks of the fields that an OpenAI
        request had `given`."""
        fields = {**origin(), **fields, "tenant": caller.tenant}
        if isinstance(fields.get("deadline"), str):
            fields["deadline"] = await self._seconds_left(fields["deadline"])
        try:
            return await self._client.accept(fields, max_value=caller.max_value)
        except InvalidTask as error:
            if given is None:
                raise
            raise type(error)(as_asked(str(error), given)) from None

    async def _seconds_left(self, deadline: str) -> float:
        """A deadline given as text: seconds, or a time (RFC 3339) by the server's clock."""
        return seconds_left(deadline, await self._pool.run("", self._ledger.now))

    async def submit(self, caller: Caller, specs: Iterable[TaskSpec]) -> list[Accepted]:
        """Submit checked tasks. Raises ApiError where they are too many at once, or where an idempotency key was used
        for another task, here or before: none of them is kept then."""
        tasks = [(new_id(), spec) for spec in specs]
        await self._check_idempotency_keys(caller, [spec for _, spec in tasks])
        key = caller.key
        if key is not None and key.in_flight is not None:
            counted = {task_id: spec.deadline for task_id, spec in tasks}
            if not await self._pool.run(caller.name, self._keys.reserve, key, counted):
                raise ApiError(
                    429,
                    f"more than {key.in_flight} unfinished tasks with this key",
                    code="in_flight_limit_exceeded",
                    headers={"Retry-After": "1"},
                )
        stored = await self._coalescer.submit(caller.tenant, tasks)
        new = {own for (own, _), (in_force, _) in zip(tasks, stored, strict=True) if own == in_force}
        accepted = []
        for (own, spec), (in_force, at) in zip(tasks, stored, strict=True):
            if in_force == own:
                log.info("task_submitted", task_id=own, tenant=caller.tenant, service=spec.service, **spec.origin())
                accepted.append(Accepted(own, spec, at))
                continue
            first = await self.record(caller, in_force)
            if not _same_work(first.spec, spec):  # another request was faster, after the keys were checked
                for task_id in new:
                    await self._pool.run(caller.tenant, self._ledger.forget, task_id)
                raise _reused(spec)
            log.info("task_repeated", task_id=in_force, tenant=caller.tenant, **spec.origin())
            accepted.append(Accepted(in_force, first.spec, first.submitted, repeated=True))
        return accepted

    async def _check_idempotency_keys(self, caller: Caller, specs: list[TaskSpec]) -> None:
        """That each idempotency key of a request of many stands for one task. That of a request of one is checked when
        it is stored."""
        firsts: dict[str, TaskSpec] = {}
        for spec in specs:
            if spec.idempotency_key is not None and not _same_work(firsts.setdefault(spec.idempotency_key, spec), spec):
                raise _reused(spec)
        if len(specs) == 1 or not firsts:
            return
        holders = await self._pool.run(caller.tenant, self._ledger.holders, caller.tenant, list(firsts))
        for spec, holder in zip(firsts.values(), holders, strict=True):
            if holder is not None and not _same_work((await self.record(caller, holder)).spec, spec):
                raise _reused(spec)

    async def record(self, caller: Caller, task_id: str, what: str = "task") -> TaskRecord:
        """A task of this caller's tenant. Raises ApiError (404)."""
        if len(task_id) > MAX_ID:
            raise not_found(what, task_id)
        record = await self._pool.run(caller.tenant, self._ledger.task, task_id)
        if record is None or record.spec.tenant != caller.tenant:
            raise not_found(what, task_id)
        return record

    async def forget(self, caller: Caller, task_id: str, what: str = "task") -> None:
        """Forget a task of this caller's tenant; one that goes on is cancelled first. Raises ApiError (404)."""
        await self.record(caller, task_id, what)
        await self._pool.run(caller.tenant, self._ledger.forget, task_id)

    async def cancel(self, caller: Caller, task_id: str, what: str = "task") -> TaskRecord:
        """Cancel a task of this caller's tenant, and find it then. Raises ApiError (404)."""
        await self.record(caller, task_id, what)
        await self._client.cancel(task_id)
        return await self.record(caller, task_id, what)


def _reused(spec: TaskSpec) -> ApiError:
    message = f"idempotency_key: {spec.idempotency_key!r} was used for another request"
    return ApiError(422, message, param="idempotency_key", code="idempotency_key_reused")


def _same_work(first: TaskSpec, again: TaskSpec) -> bool:
    """Whether a repeated request asks for the same work. Its deadline may have been counted from another moment, it may
    be answered in another way, and what embeds, and how wide, been known only once."""
    may_differ = ["deadline", "stream", "request", "request_id", "traceparent"]
    if again.kind == "embed":
        may_differ += [n for n in ("model", "dimensions") if None in (getattr(first, n), getattr(again, n))]
    return first.model_copy(update={name: getattr(again, name) for name in may_differ}) == again
