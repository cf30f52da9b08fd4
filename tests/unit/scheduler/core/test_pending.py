"""The pending pool against a plain list, and what it costs in memory."""

from __future__ import annotations

import random
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perllm.scheduler import examples
from perllm.scheduler.core.cluster import Demand, Task
from perllm.scheduler.core.heap import Heap
from perllm.scheduler.core.pending import Pending

ANY = Demand()


def task(task_id: str, deadline: float = 10.0, demand: Demand = ANY, submitted: float = 0.0) -> Task:
    return examples.task(task_id, at=submitted, left=deadline - submitted, model=demand.model, needs=demand.needs)


@dataclass
class Entry:
    task: Task
    order: int
    until: float | None = None  # parked until then; None: fresh
    rank: float = 0.0
    out: bool = False
    ticket: int = 0  # order in which it was parked
    due: bool = False  # to be taken in this scan
    asleep: bool = False  # it may not start yet


class PoolMachine(RuleBasedStateMachine):
    """Every operation on the pool, beside a model that looks at all tasks each time."""

    DEMANDS = (ANY, Demand("a"), Demand("a", ("tools",)), Demand(None, ("tools",)))

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pending()
        self.model: dict[str, Entry] = {}
        self.open: set[Demand] = set()
        self.count = 0
        self.now = 0.0

    @rule(deadline=st.integers(1, 8), demand=st.sampled_from(DEMANDS), again=st.booleans(), start=st.integers(0, 6))
    def add(self, deadline: int, demand: Demand, again: bool, start: int) -> None:
        if again and self.model:
            self.pool.add(next(iter(self.model.values())).task)
            return
        self.count += 1
        new = task(f"t{self.count}", self.now + deadline, demand)
        new.start = self.now + start if 0 < start < deadline else new.submitted
        self.pool.add(new)
        self.model[new.id] = Entry(new, self.count, asleep=new.start > new.submitted)

    @rule(fresh=st.sets(st.sampled_from(DEMANDS)), parked=st.sets(st.sampled_from(DEMANDS)))
    def take(self, fresh: set[Demand], parked: set[Demand]) -> None:
        idle = [e for e in self.model.values() if not e.out]
        able = [e for e in idle if e.until is None and not e.asleep and e.task.demand in fresh]
        best = min(able, key=lambda e: (e.task.deadline, e.order), default=None)
        was_parked = best is None
        if best is None:
            able = [e for e in idle if e.until is not None and e.task.demand in parked & self.open and e.due]
            best = min(able, key=lambda e: (-e.rank, e.ticket), default=None)
        got = self.pool.take(fresh, parked)
        assert got == (None if best is None else (best.task, was_parked))
        if best:
            best.out = True
            best.due = False

    def _one_out(self) -> Entry | None:
        return next((e for e in self.model.values() if e.out), None)

    @precondition(lambda self: self._one_out())
    @rule(rest=st.integers(0, 9))
    def park(self, rest: int) -> None:
        if entry := self._one_out():
            self.count += 1
            entry.rank, entry.ticket = float(rest % 3), self.count
            self.pool.park(entry.task, self.now + rest, entry.rank)
            entry.out, entry.until = False, min(self.now + rest, entry.task.deadline)

    @precondition(lambda self: self._one_out())
    @rule()
    def put_back(self) -> None:
        if entry := self._one_out():
            self.pool.put_back(entry.task)
            entry.out, entry.until = False, None

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.model)))
        self.pool.remove(task_id)
        gone = self.model.pop(task_id)
        if all(e.task.demand != gone.task.demand for e in self.model.values()):
            self.open.discard(gone.task.demand)  # an empty lane forgets

    @rule(demands=st.sets(st.sampled_from(DEMANDS)))
    def end_scan(self, demands: set[Demand]) -> None:
        self.pool.end_scan(demands)
        self.open -= demands

    @rule(demands=st.sets(st.sampled_from(DEMANDS)), go_on=st.booleans())
    def scan(self, demands: set[Demand], go_on: bool) -> None:
        (self.pool.continue_scan if go_on else self.pool.rescan)(demands)
        self.open |= demands & {e.task.demand for e in self.model.values()}
        for demand in demands:
            lane = [e for e in self.model.values() if e.task.demand == demand]
            parked = [e for e in lane if e.until is not None and not e.out]
            if not go_on or not any(e.due for e in parked):
                for entry in parked:
                    entry.due = True

    @rule(step=st.integers(0, 4))
    def wake_due(self, step: int) -> None:
        self.now += step
        late = {t.id for t in self.pool.wake_due(self.now)}
        idle = [e for e in self.model.values() if not e.out]
        assert late == {e.task.id for e in idle if e.task.deadline <= self.now}
        for entry in idle:
            if entry.task.id in late:
                entry.out, entry.due = True, False
            entry.asleep &= entry.task.start > self.now
            if entry.task.id not in late and entry.until is not None and entry.until <= self.now:
                entry.until, entry.due = None, False

    @invariant()
    def agree(self) -> None:
        assert len(self.pool) == len(self.model)
        assert self.pool.awake == sum(not e.asleep for e in self.model.values())
        assert {t.id: t for t in self.pool} == {i: e.task for i, e in self.model.items()}
        for task_id in self.model:
            assert task_id in self.pool


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_arrival_order_without_edf() -> None:
    pool = Pending(edf=False)
    pool.add(task("late", deadline=9, submitted=2))
    pool.add(task("early", deadline=99, submitted=1))
    got = pool.take([ANY])
    assert got is not None
    assert got[0].id == "early"


def test_of_the_parked_the_highest_rank_comes_first() -> None:
    pool = Pending()
    for i, rank in enumerate((1.0, 5.0, -3.0)):
        pool.add(task(f"t{i}", deadline=10.0 + i))
        got = pool.take([ANY])
        assert got is not None
        pool.park(got[0], until=9.0, rank=rank)
    assert pool.take([ANY], [ANY]) is None  # no scan is on
    pool.rescan([ANY])
    order = [got[0].id for _ in range(3) if (got := pool.take([], [ANY]))]
    assert order == ["t1", "t0", "t2"]


def test_every_field_survives() -> None:
    given = task("x", demand=Demand("m", ("chat", "tools")))
    given.fit_context = True
    given.value, given.expected_tokens, given.strikes, given.attempt = 0.1, 77, 2, 3
    given.avoid, given.start, given.n = {"edge-1": 20.0}, 4.0, 16
    given.origin = {"request_id": "r", "trace_id": "0" * 32}
    pool = Pending()
    pool.add(given)
    assert pool.get("x") == given


def test_a_million_that_may_start_at_once_do_so_piece_by_piece() -> None:
    pool = Pending()
    for i in range(12_000):
        sleeper = task(f"t{i}", deadline=100.0)
        sleeper.start = 50.0
        pool.add(sleeper)
    pool.add(task("awake", deadline=99.0))
    assert pool.awake == 1
    assert pool.wake_due(49.0) == []
    assert (pool.take([ANY]) or pytest.fail("it may start"))[0].id == "awake"
    assert pool.take([None], [None]) is None
    woken = []
    while pool.awake < len(pool):
        before = pool.awake
        pool.wake_due(50.0)
        woken.append(pool.awake - before)
    assert sum(woken) == 12_000
    assert max(woken) < 12_000


def test_parking_for_ever_leaves_no_dead_entries_behind() -> None:
    pool = Pending()
    for i in range(10):
        pool.add(task(f"t{i}", deadline=1e6))
    for step in range(3000):
        pool.rescan([ANY])
        got = pool.take([ANY], [ANY])
        assert got is not None
        pool.park(got[0], until=10.0 + step)
    lane = pool._lanes[ANY]
    assert max(len(lane.parked), len(lane.fresh), len(pool._wakeups)) <= 4 * 10 + 64


def test_a_row_is_used_again() -> None:
    pool = Pending()
    for i in range(20_000):
        pool.add(task(f"t{i}", deadline=1e6 + i))
        if i >= 100:
            pool.remove(f"t{i - 100}")
    assert pool._rows <= 101
    assert len(pool._wakeups) <= 4 * 100 + 64 + 1


@pytest.mark.parametrize("seed", range(3))
def test_heap_sorts(seed: int) -> None:
    rng = random.Random(seed)
    heap, pairs = Heap(), []
    for i in range(500):
        key = rng.choice([1.0, 2.0, rng.random()])
        pairs.append((key, i))
        heap.push(key, i)
    out = [heap.pop() for _ in range(500)]
    assert out == sorted(pairs)
