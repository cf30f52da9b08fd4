"""The ledger as everybody may read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, cast

import redis

from perllm.broker.connection import of_a_record, reaching
from perllm.broker.errors import Unreadable
from perllm.broker.ledger.base import LedgerBase, readable
from perllm.broker.ledger.records import (
    ENDING_FIELDS,
    Glance,
    Gone,
    Leader,
    TaskRecord,
    beliefs_of,
    deltas_of,
    glance_of,
    gone_of,
    is_id,
    node_of,
    outcome_of,
    record_of,
    result_of,
    state_of,
    text_of,
)
from perllm.broker.logs import LazyLogger
from perllm.broker.messages import Delta, Heartbeat, NodeBelief, NodeInfo, Result, State

#: Bytes of results read in one call, and how many results are read at once whatever their size.
READ_BYTES, FEW = 8 << 20, 4
#: Tasks looked at per call of a search: bounds how long one holds the server.
_SCAN = 2_000

log = LazyLogger(__name__)


class Query(LedgerBase):
    """See Ledger."""

    def task(self, task_id: str) -> TaskRecord | None:
        """Everything known of a task, or None. Raises Unreadable."""
        with reaching(self.settings):
            pipe = self._client.pipeline()
            pipe.hgetall(f"{self._prefix}task:{task_id}")
            pipe.get(f"{self._prefix}result:{task_id}")
            try:
                raw, result = pipe.execute()
            except redis.exceptions.ResponseError as error:
                if not of_a_record(error):
                    raise
                raise Unreadable(f"what is stored as task {task_id!r} is none: {error}") from None
        return record_of(task_id, raw, result) if raw else None

    def legible(self, task_ids: Sequence[str]) -> list[TaskRecord]:
        """Everything known of those of these tasks that are there, in order. One that cannot be read is logged and
        passed over."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hgetall(f"{self._prefix}task:{task_id}")
                pipe.get(f"{self._prefix}result:{task_id}")
            replies = list(readable(pipe.execute(raise_on_error=False)))
        found = []
        for task_id, raw, result in zip(task_ids, replies[::2], replies[1::2], strict=True):
            try:
                found += [record_of(task_id, raw, result)] if raw else []
            except Unreadable as error:
                log.warning("task_unreadable", task_id=task_id, reason=str(error))
        return found

    def results(self, task_ids: Sequence[str]) -> list[Result | None]:
        """The results of those that are final, None for the others and the unknown, in order. One that cannot be read
        is that of a failed task which says so."""
        return list(self.each_result(task_ids))

    def each_result(self, task_ids: Sequence[str]) -> Iterator[Result | None]:
        """The same one by one, of which only so many are held at once as have `READ_BYTES` together, or one."""
        for some in self.readable_at_once(task_ids):
            yield from self._results(some)

    def readable_at_once(self, task_ids: Sequence[str]) -> Iterator[Sequence[str]]:
        """Neighbours among these whose results are read in one call: an answer is held whole by the server, too."""
        if len(task_ids) <= FEW:
            yield task_ids
            return
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.strlen(f"{self._prefix}result:{task_id}")
            sizes = [size if isinstance(size, int) else 0 for size in pipe.execute(raise_on_error=False)]
        start = total = 0
        for number, size in enumerate(sizes):
            if number > start and total + size > READ_BYTES:
                yield task_ids[start:number]
                start, total = number, 0
            total += size
        yield task_ids[start:]

    def _results(self, task_ids: Sequence[str]) -> list[Result | None]:
        if not task_ids:
            return []
        with reaching(self.settings):
            kept = cast("list[bytes | None]", self._client.mget([f"{self._prefix}result:{i}" for i in task_ids]))
            others = [i for i, raw in zip(task_ids, kept, strict=True) if raw is None]
            pipe = self._client.pipeline(transaction=False)
            for task_id in others:
                pipe.hmget(f"{self._prefix}task:{task_id}", *ENDING_FIELDS)
            endings = dict(zip(others, readable(pipe.execute(raise_on_error=False)), strict=True))
        return [result_of(i, raw, endings.get(i)) for i, raw in zip(task_ids, kept, strict=True)]

    def outcomes(self, task_ids: Sequence[str]) -> list[Result | float | None]:
        """What those who wait for these tasks are to know, in order: the result or, of one that is not final, seconds
        to its deadline (by the server's clock, below 0 once it has passed); None for the unknown. Of many, first
        `readable_at_once`."""
        if not task_ids:
            return []
        with reaching(self.settings):
            kept = cast("list[bytes | None]", self._client.mget([f"{self._prefix}result:{i}" for i in task_ids]))
            found: dict[str, Result | float | None] = {
                i: result_of(i, raw, None) for i, raw in zip(task_ids, kept, strict=True) if raw is not None
            }
            others = [i for i in task_ids if i not in found]
            if not others:
                return [found[i] for i in task_ids]
            pipe = self._client.pipeline(transaction=False)
            pipe.time()
            for task_id in others:
                pipe.hmget(f"{self._prefix}task:{task_id}", *ENDING_FIELDS, "deadline")
            clock, *rows = pipe.execute(raise_on_error=False)
            if isinstance(clock, Exception):
                raise clock
            now = clock[0] + clock[1] / 1e6
            for task_id, row in zip(others, readable(rows), strict=True):
                found[task_id] = outcome_of(task_id, row, now)
        return [found[i] for i in task_ids]

    def glances(self, task_ids: Sequence[str]) -> list[Glance | None]:
        """What lists filter by, None for the unknown and the unreadable, in order; without the tasks' texts."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id in task_ids:
                key = f"{self._prefix}task:{task_id}"
                pipe.hmget(key, "state", "features")
                pipe.hstrlen(key, "payload")
                pipe.strlen(f"{self._prefix}result:{task_id}")
            replies = list(readable(pipe.execute(raise_on_error=False)))
        return [glance_of(*row) for row in zip(replies[::3], replies[1::3], replies[2::3], strict=True)]

    def states(self, task_ids: Sequence[str]) -> list[State | None]:
        """Where these tasks are, None for the unknown, in order."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hget(f"{self._prefix}task:{task_id}", "state")
            return [state_of(raw) for raw in readable(pipe.execute(raise_on_error=False))]

    def tenants(self, task_ids: Sequence[str]) -> list[str | None]:
        """Whose these tasks are, None for the unknown, in order."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hget(f"{self._prefix}task:{task_id}", "tenant")
            return [text_of(raw) if raw else None for raw in readable(pipe.execute(raise_on_error=False))]

    def known(self, task_ids: Sequence[str]) -> list[bool]:
        """Which of these tasks the ledger holds, in order."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.exists(f"{self._prefix}task:{task_id}")
            return [bool(n) for n in pipe.execute()]

    def beginning_with(self, prefix: str, most: int) -> list[str]:
        """Ids of up to `most` tasks that begin so, in order. Every task is looked at, so this is for people."""
        found: set[str] = set()
        if not is_id(prefix):
            return []
        with reaching(self.settings):
            for state in State:
                pairs = self._client.zscan_iter(f"{self._prefix}in:{state}", match=f"{prefix}*", count=_SCAN)
                found |= {text_of(raw) for raw, _ in islice(pairs, most)}
        return sorted(found)[:most]

    def deltas(self, task_id: str, start: int = 0) -> list[tuple[int, list[Delta]]]:
        """What was published of a streamed task's answer from number `start` on, each with the attempt that generated
        it. What cannot be read is passed over."""
        with reaching(self.settings):
            return _pieces(cast("list[bytes]", self._client.lrange(f"{self._prefix}text:{task_id}", start, -1)))

    def news(self, watched: Sequence[tuple[str, int]]) -> list[bool]:
        """For tasks, each with how many pieces of its text are known (-1: they do not matter): whether there is more,
        or it has ended or is no more, or cannot be read; in one round trip."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id, pieces in watched:
                pipe.hget(f"{self._prefix}task:{task_id}", "state")
                if pieces >= 0:
                    pipe.llen(f"{self._prefix}text:{task_id}")
            replies = iter(pipe.execute(raise_on_error=False))
        waiting = {State.PENDING.encode(), State.DISPATCHED.encode(), State.RUNNING.encode()}
        return [(next(replies) not in waiting) | (pieces >= 0 and next(replies) != pieces) for _, pieces in watched]

    def said(self, task_id: str) -> str:
        """The channel on which new pieces of its text are announced."""
        return f"{self._prefix}said:{task_id}"

    def ended(self, task_id: str) -> str:
        """The channel on which its end is announced."""
        return f"{self._prefix}ended:{task_id}"

    def tasks_of(self, tenant: str, *, after: str | None, limit: int, newest: bool = True) -> list[str]:
        """Up to `limit` ids of a tenant's tasks by the time of their submission, those that follow the task `after`."""
        key = f"{self._prefix}of:{tenant}"
        with reaching(self.settings):
            start = 0
            if after is not None:
                rank = self._client.zrevrank(key, after) if newest else self._client.zrank(key, after)
                if rank is None:
                    return []
                start = cast(int, rank) + 1
            raw = self._client.zrange(key, start, start + limit - 1, desc=newest)
        return [text_of(i) for i in cast("list[bytes]", raw)]

    def ids(self, state: State, *, start: int = 0, limit: int = -1, newest: bool = False) -> list[str]:
        """Ids of tasks in a state: pending by deadline, placed by lease, final by when they ended."""
        stop = -1 if limit < 0 else start + limit - 1
        with reaching(self.settings):
            raw = self._client.zrange(f"{self._prefix}in:{state}", start, stop, desc=newest)
        return [text_of(i) for i in cast("list[bytes]", raw)]

    def unfinished(self) -> Iterator[tuple[State, str]]:
        """Every pending, dispatched and running task's id."""
        for state in (State.RUNNING, State.DISPATCHED, State.PENDING):
            for task_id in self.ids(state):
                yield state, task_id

    def stored_bytes(self, tenants: Sequence[str]) -> list[int]:
        """Bytes the tasks of these tenants take, finished ones and results included, in order."""
        with reaching(self.settings):
            raw = cast("list[bytes | None]", self._client.hmget(f"{self._prefix}bytes", list(tenants)))
        return [int(n) if n else 0 for n in raw]

    def counts(self) -> dict[State, int]:
        """How many tasks are in each state."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for state in State:
                pipe.zcard(f"{self._prefix}in:{state}")
            return dict(zip(State, pipe.execute(), strict=True))

    def totals(self) -> dict[str, int]:
        """How many tasks were ever submitted, ended in each final state, and forgotten since."""
        with reaching(self.settings):
            raw = cast("dict[bytes, bytes]", self._client.hgetall(f"{self._prefix}totals"))
        return {k.decode(): int(v) for k, v in raw.items()}

    def nodes(self) -> list[tuple[NodeInfo, Heartbeat | None, bool]]:
        """Every live node: its registration, its last heartbeat if any, and whether it is draining."""
        with reaching(self.settings):
            names = cast("list[bytes]", self._client.zrange(f"{self._prefix}nodes", 0, -1))
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                pipe.hmget(f"{self._prefix}node:".encode() + name, "info", "beat", "draining")
            rows = readable(pipe.execute(raise_on_error=False))
            return [node for row in rows if row and (node := node_of(row)) is not None]

    def gone(self) -> list[Gone]:
        """Nodes that left or died and did not come back. Some of them, and none for longer than the retention."""
        with reaching(self.settings):
            raw = cast("dict[bytes, bytes]", self._client.hgetall(f"{self._prefix}gone"))
        return [node for said in raw.values() if (node := gone_of(said)) is not None]

    def learned(self) -> dict[str, NodeBelief]:
        """What the leading scheduler, or the last one, believes of the nodes; nothing where it believes nothing, or
        this user may not know."""
        with reaching(self.settings):
            return beliefs_of(self._get_if_allowed("learned"))

    def metrics(self) -> dict[str, Any]:
        """The sums the leading scheduler keeps, as it last wrote them down: `perllm.broker.metrics.Sums.dump` under
        `sums`, and `at`, when that was (s, the server's clock). Empty where there are none, or this user may not know
        them: they name tenants."""
        with reaching(self.settings):
            raw = self._get_if_allowed("metrics")
        try:
            data = json.loads(raw) if raw else {}
        except ValueError:
            data = None
        return data if isinstance(data, dict) else {}

    def _get_if_allowed(self, key: str) -> bytes | None:
        try:
            return cast("bytes | None", self._client.get(f"{self._prefix}{key}"))
        except redis.exceptions.NoPermissionError:
            return None

    def server_memory(self) -> tuple[int, int]:
        """Bytes the server's data takes, and may take (0: no limit)."""
        with reaching(self.settings):
            info = self._client.info("memory")
        return int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))

    def distrusted(self, nodes: Sequence[str]) -> dict[str, str]:
        """Those of these nodes the scheduler sends little, and why."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for name in nodes:
                pipe.hget(f"{self._prefix}node:{name}", "distrusted")
            rows = readable(pipe.execute(raise_on_error=False))
        return {name: text_of(reason) for name, reason in zip(nodes, rows, strict=True) if reason}

    def led(self) -> bool:
        """Whether a scheduler leads."""
        with reaching(self.settings):
            return bool(self._client.exists(f"{self._prefix}leader"))

    def leader(self) -> Leader | None:
        """Which scheduler leads, since when, under which policy; None while none does."""
        with reaching(self.settings):
            raw = cast("bytes | None", self._client.get(f"{self._prefix}leader"))
        return Leader.parse(raw.decode()) if raw else None

    def now(self) -> float:
        """The server's clock."""
        with reaching(self.settings):
            seconds, micros = self._client.time()
        return seconds + micros / 1e6


def _pieces(raw: list[bytes]) -> list[tuple[int, list[Delta]]]:
    pairs = (text_of(piece).partition(" ") for piece in raw)
    return [(int(attempt) if attempt.isdecimal() else 0, deltas_of(text)) for attempt, _, text in pairs]
