"""The pending pool: unfinished tasks that are on no node, in order of urgency, in about 280 bytes each.

A task's fields are kept in a row of a structured array and become a `Task` when it is decided about. There is one lane
per demand (a model, or any, and what it must be able to do), so that work for a model that is full (or nowhere) never
stands before work that could run. In its lane a task is `fresh`, to be decided about in the next round, or `parked`:
nothing good enough was free, and it waits until its wake-up time or its turn in a scan. One that may not start yet is
`asleep`, in no order but that of wake-up times. A scan goes through the parked in order of how near they were to being
placed, a few in each round; it begins anew when room appears (`rescan`), goes on when something may have changed
(`continue_scan`), and stops with the round (`end_scan`). So a round costs what there is to decide, however many tasks
wait, and no task waits for long beside a node that would take it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.core.cluster import Demand, Task
from perllm.scheduler.core.heap import Heap, Ints

_CHUNK = 1 << 13  # rows per array
_ROW = np.dtype(
    [
        ("id", "O"),
        ("service", "O"),
        ("tenant", "O"),
        ("demand", "O"),
        ("text", "O"),
        ("origin", "O"),  # request and trace, in one text
        ("deadline", "f8"),
        ("submitted", "f8"),
        ("start", "f8"),  # it is not to be placed before, s
        ("wake_at", "f8"),  # when it is fresh again or expires, s
        ("value", "f8"),
        ("payload_bytes", "u4"),
        ("prompt_tokens", "u4"),
        ("max_tokens", "u4"),
        ("expected_tokens", "u4"),  # 0: none
        ("attempt", "u4"),
        ("serial", "u4"),  # order of arrival here; 0: the row is free
        ("ticket", "u4"),  # order in which it was parked last
        ("group", "u2"),
        ("n", "u1"),
        ("strikes", "u1"),
        ("fit_context", "u1"),
        ("state", "u1"),
    ]
)
_FRESH, _PARKED, _OUT, _ASLEEP = 1, 2, 3, 4
#: The field that must still be what a heap's entry of a task in this state says, or the entry is dead.
_MARK = {_FRESH: "serial", _PARKED: "ticket"}
#: Tasks that are let go to their lanes in one call: bounds a round when a million may start at midnight.
_MAX_WAKING = 2_000
_UINT32_MAX = 2**32 - 1
_PUSH_RATIO = 16  # a heap so many times smaller is pushed into another entry by entry, not merged


class _Lane:
    """The pending tasks of one demand, in order of urgency."""

    __slots__ = ("demand", "fresh", "live", "parked", "scanned", "scanning")

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.fresh, self.parked = Heap(), Heap()
        self.scanned = Heap()  # the parked that were decided about since the scan began
        self.live = 0
        self.scanning = False  # the parked may be taken

    def restart_scan(self) -> None:
        """The scan begins anew with the first of the parked."""
        if not len(self.scanned):
            return
        if len(self.scanned) * _PUSH_RATIO < len(self.parked):
            while len(self.scanned):
                self.parked.push(*self.scanned.pop())
            return
        entries = zip(self.parked.entries(), self.scanned.entries(), strict=True)
        keys, items = (np.concatenate(pair) for pair in entries)
        self.parked.replace(keys, items)
        self.scanned = Heap()


class Pending:
    """A priority pool of tasks, ordered by deadline (EDF) or by arrival (FIFO); ties by order of arrival here.

    `add`, `remove`, `take`, `park` cost O(log n). Removal is lazy: heaps keep dead entries until they surface or are
    more than the living.
    """

    def __init__(self, *, edf: bool = True) -> None:
        self._edf = edf
        self._index: dict[str, int] = {}  # task id → row
        self._chunks: list[NDArray[np.void]] = []
        self._free: list[int] = []
        self._rows = 0  # rows ever used
        self._serial = self._ticket = 0
        self._asleep = 0
        self._avoid: dict[int, Mapping[str, float]] = {}  # row → nodes; most tasks avoid none
        self._lanes: dict[Demand, _Lane] = {}
        self._wakeups = Heap()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def awake(self) -> int:
        """How many may be placed now."""
        return len(self._index) - self._asleep

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._index

    def __iter__(self) -> Iterator[Task]:
        return (self._task(row) for row in list(self._index.values()))

    @property
    def demands(self) -> Iterable[Demand]:
        """Those of all tasks here."""
        return self._lanes.keys()

    def backlog(self) -> dict[int, tuple[int, float]]:
        """Per group that has a task here, how many may be placed now, and since when the longest waiting of them might
        (s)."""
        counts, oldest = np.full(0, -1), np.zeros(0)  # −1: none is here
        for chunk in self._chunks:
            here = np.flatnonzero(chunk["serial"])
            if not len(here):
                continue
            groups = chunk["group"][here]
            if (more := int(groups.max()) + 1 - len(counts)) > 0:
                counts = np.concatenate([counts, np.full(more, -1)])
                oldest = np.concatenate([oldest, np.full(more, np.inf)])
            counts[(counts < 0) & (np.bincount(groups, minlength=len(counts)) > 0)] = 0
            awake = chunk["state"][here] != _ASLEEP
            here, groups = here[awake], groups[awake]
            counts += np.bincount(groups, minlength=len(counts))
            np.minimum.at(oldest, groups, np.maximum(chunk["submitted"][here], chunk["start"][here]))
        return {int(g): (int(counts[g]), float(oldest[g])) for g in np.flatnonzero(counts >= 0)}

    def get(self, task_id: str) -> Task | None:
        """A copy of the pending task of this id."""
        row = self._index.get(task_id)
        return None if row is None else self._task(row)

    # --- in

    def add(self, task: Task) -> None:
        """Add a task, fresh, or asleep until it may start: `wake_due` knows. A task that is here stays as it is."""
        if task.id in self._index:
            return
        row = self._free.pop() if self._free else self._grow()
        lane = self._lanes.get(task.demand)
        if lane is None:
            lane = self._lanes[task.demand] = _Lane(task.demand)
        self._serial = serial = self._serial % _UINT32_MAX + 1
        asleep = task.start > task.submitted and task.attempt == 0
        wake_at = task.start if asleep else task.deadline
        self._chunks[row // _CHUNK][row % _CHUNK] = (
            task.id,
            intern(task.service),
            intern(task.tenant),
            lane.demand,
            task.text,
            f"{task.origin.get('request_id', '')} {task.origin.get('trace_id', '')}" if task.origin else None,
            task.deadline,
            task.submitted,
            task.start,
            wake_at,
            task.value,
            min(task.payload_bytes, _UINT32_MAX),
            min(task.prompt_tokens, _UINT32_MAX),
            min(task.max_tokens, _UINT32_MAX),
            task.expected_tokens or 0,
            task.attempt,
            serial,
            0,
            task.group,
            task.n,
            min(task.strikes, 255),
            task.fit_context,
            _ASLEEP if asleep else _FRESH,
        )
        self._index[task.id] = row
        if task.avoid:
            self._avoid[row] = task.avoid
        lane.live += 1
        item = serial << 32 | row
        if asleep:
            self._asleep += 1
        else:
            lane.fresh.push(self._key(task), item)
        self._wakeups.push(wake_at, item)

    def park(self, task: Task, until: float, rank: float = 0.0) -> None:
        """A taken task waits until `until` (s), or until the next scan of its lane, where higher ranks come first."""
        self._return(task, _PARKED, min(until, task.deadline), -rank)

    def put_back(self, task: Task) -> None:
        """A taken task is fresh again."""
        self._return(task, _FRESH, task.deadline, self._key(task))

    def _return(self, task: Task, state: int, wake_at: float, key: float) -> None:
        row = self._index[task.id]
        record = self._record(row)
        item = int(record["serial"]) << 32 | row
        lane = self._lanes[record["demand"]]
        if state == _PARKED:
            record["ticket"] = self._ticket = self._ticket % _UINT32_MAX + 1
            heap = lane.scanned
            heap.push(key, self._ticket << 32 | row)
        else:
            heap = lane.fresh
            heap.push(key, item)
        if record["wake_at"] != wake_at:
            record["wake_at"] = wake_at
            self._wakeups.push(wake_at, item)
            if len(self._wakeups) > 4 * len(self._index) + 64:
                self._tidy_wakeups()
        record["state"] = state
        if len(heap) > 2 * lane.live + 64:
            self._tidy(heap, state)

    # --- out

    def remove(self, task_id: str) -> None:
        """Drop a task, wherever it is."""
        row = self._index.pop(task_id, None)
        if row is None:
            return
        record = self._record(row)
        self._asleep -= bool(record["state"] == _ASLEEP)
        lane = self._lanes[record["demand"]]
        lane.live -= 1
        if not lane.live:
            del self._lanes[lane.demand]
        self._avoid.pop(row, None)
        self._chunks[row // _CHUNK][row % _CHUNK] = (*(None,) * 6, *(0,) * 17)
        self._free.append(row)
        if len(self._wakeups) > 4 * len(self._index) + 64:
            self._tidy_wakeups()

    def take(self, fresh: Iterable[Demand], parked: Iterable[Demand] = ()) -> tuple[Task, bool] | None:
        """Take the most urgent fresh task of the demands `fresh` or, when there is none, the next one in the scans of
        those in `parked`. Returns it and whether it was parked, or None.

        It stays in the pool until `remove`; until `park` or `put_back` it is not taken again.
        """
        found = self._first(fresh, _FRESH) or self._first(parked, _PARKED)
        if found is None:
            return None
        heap, row = found
        heap.pop()
        record = self._record(row)
        was_parked = bool(record["state"] == _PARKED)
        record["state"] = _OUT
        return self._task(row), was_parked

    def _first(self, demands: Iterable[Demand], state: int) -> tuple[Heap, int] | None:
        """The heap, and the row, of the first task in this state over the lanes of `demands`."""
        lanes = [lane for demand in demands if (lane := self._lanes.get(demand)) is not None]
        heaps = [lane.fresh for lane in lanes] if state == _FRESH else [lane.parked for lane in lanes if lane.scanning]
        while heaps := [heap for heap in heaps if len(heap)]:
            best = min(heaps, key=Heap.peek)
            first = best.peek()
            if self._head(best, state) == first:  # else what was first is no more
                return best, first[1] & 0xFFFFFFFF
        return None

    def rescan(self, demands: Iterable[Demand]) -> None:
        """Room appeared for these demands: their parked tasks are scanned from the first one on, until `end_scan`."""
        for demand in demands:
            if (lane := self._lanes.get(demand)) is not None:
                self._restart_scan(lane)
                lane.scanning = True

    def continue_scan(self, demands: Iterable[Demand]) -> None:
        """Something may have changed for these demands: the scan goes on, or begins anew, until `end_scan`."""
        for demand in demands:
            if (lane := self._lanes.get(demand)) is not None:
                if self._head(lane.parked, _PARKED) is None:
                    self._restart_scan(lane)
                lane.scanning = True

    def end_scan(self, demands: Iterable[Demand]) -> None:
        """A round has decided about enough of these demands' tasks: no more of the parked are taken."""
        for demand in demands:
            if (lane := self._lanes.get(demand)) is not None:
                lane.scanning = False

    def _restart_scan(self, lane: _Lane) -> None:
        lane.restart_scan()
        if len(lane.parked) > 2 * lane.live + 64:
            self._tidy(lane.parked, _PARKED)

    def wake_due(self, now: float) -> list[Task]:
        """Parked tasks whose wake-up time has come are fresh again, and those asleep that may start (of very many some,
        the others in the next calls). Returns those whose deadline has passed, taken."""
        late = []
        wakeups = self._wakeups
        waking = 0
        while len(wakeups) and wakeups.peek()[0] <= now and waking < _MAX_WAKING:
            when, item = wakeups.pop()
            row = item & 0xFFFFFFFF
            record = self._record(row)
            if record["serial"] != item >> 32 or record["wake_at"] != when:
                continue
            record["wake_at"] = -np.inf  # set anew when it returns
            if record["state"] == _OUT:
                continue
            if record["state"] == _ASLEEP:
                self._asleep -= 1
                waking += 1
            task = self._task(row)
            if task.deadline <= now:
                record["state"] = _OUT
                late.append(task)
            else:
                self._return(task, _FRESH, task.deadline, self._key(task))
        return late

    # --- rows

    def _grow(self) -> int:
        if self._rows == len(self._chunks) * _CHUNK:
            self._chunks.append(np.zeros(_CHUNK, _ROW))
        self._rows += 1
        return self._rows - 1

    def _record(self, row: int) -> np.void:
        record: np.void = self._chunks[row // _CHUNK][row % _CHUNK]
        return record

    def _task(self, row: int) -> Task:
        values: Any = self._record(row).item()
        task_id, service, tenant, demand, text, origin, deadline, submitted, start, _, value, payload = values[:12]
        prompt, most, expected, attempt = values[12:16]
        return Task(
            id=task_id,
            submitted=submitted,
            deadline=deadline,
            value=value,
            service=service,
            tenant=tenant,
            demand=demand,
            prompt_tokens=prompt,
            payload_bytes=payload,
            max_tokens=most,
            fit_context=bool(values[-2]),
            expected_tokens=expected or None,
            text=text,
            start=start,
            n=values[-4],
            group=values[-5],
            strikes=values[-3],
            attempt=attempt,
            origin=_origin(origin) if origin else {},
            avoid=self._avoid.get(row, {}),
        )

    def _key(self, task: Task) -> float:
        return task.deadline if self._edf else task.submitted

    # --- dead entries

    def _head(self, heap: Heap, state: int) -> tuple[float, int] | None:
        """The first living entry."""
        while len(heap):
            head = heap.peek()
            record = self._record(head[1] & 0xFFFFFFFF)
            if record[_MARK[state]] == head[1] >> 32 and record["state"] == state:
                return head
            heap.pop()
        return None

    def _tidy(self, heap: Heap, state: int) -> None:
        """Keep each living entry of a lane's heap once, the first it would have come up by."""
        keys, items = heap.entries()
        order = np.argsort(keys, kind="stable")
        keys, items = keys[order], items[order]
        items, first = np.unique(items, return_index=True)
        keep = self._column("state", items) == state
        keep &= self._column(_MARK[state], items) == items >> 32
        heap.replace(keys[first][keep], items[keep])

    def _tidy_wakeups(self) -> None:
        keys, items = self._wakeups.entries()
        keep = self._column("wake_at", items) == keys
        keep &= self._column("serial", items) == items >> 32
        keys, items = keys[keep], items[keep]
        items, first = np.unique(items, return_index=True)
        self._wakeups.replace(keys[first], items)

    def _column(self, name: str, items: Ints) -> NDArray[np.float64]:
        """One column of the rows of heap entries."""
        column: NDArray[np.float64] = np.concatenate([chunk[name] for chunk in self._chunks])[items & 0xFFFFFFFF]
        return column


def _origin(text: str) -> dict[str, str]:
    request_id, _, trace_id = text.partition(" ")
    return {name: value for name, value in (("request_id", request_id), ("trace_id", trace_id)) if value}
