"""What a node does not take up within its own pace is placed elsewhere, and the node is trusted again step by step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.core import Scripted, completed, core_with, info, submitted

from perllm.broker.messages import Claimed, Counters, Heartbeat, Returned
from perllm.scheduler.core.pace import FIRST_PATIENCE, LEAST_PATIENCE, LONGEST_PAUSE, MOST_PATIENCE, Pace
from perllm.scheduler.core.policy import Place
from perllm.scheduler.core.scheduler import SchedulerCore


def claimed(core: SchedulerCore, task_id: str, node: str, at: float, attempt: int = 1) -> None:
    core.handle(Claimed(at=at, id=task_id, node=node, attempt=attempt))


def beat(core: SchedulerCore, at: float, *nodes: str) -> None:
    for node in nodes:
        core.handle(Heartbeat(at=at, node=node, boot=f"{node}.1", counters=Counters()))


def lapses(core: SchedulerCore, now: float) -> list[tuple[str, list[str], bool]]:
    """What lapses then, and is taken back."""
    found = []
    for lapse in core.lapses(now):
        found.append((lapse.node.name, [t.id for t in lapse.tasks], lapse.distrust))
        for t in lapse.tasks:
            back = Returned(at=now, id=t.id, node=lapse.node.name, attempt=t.attempt, cause="lease_expired")
            core.handle(back)
    return found


def decided(core: SchedulerCore, now: float) -> dict[str, Any]:
    return {d.task.id: d.node and d.node.name for d in core.decide(now)}


def test_a_node_that_beats_and_claims_nothing_loses_its_tasks_to_another() -> None:
    core = core_with(Scripted(), info("idle"), info("good"))
    for task_id in ("t1", "t2"):
        core.handle(submitted(task_id))
    assert decided(core, 1.0) == {"t1": "idle", "t2": "idle"}
    late = 1.0 + FIRST_PATIENCE
    assert lapses(core, late + 9) == []  # nothing is known of it since
    beat(core, late - 0.1, "idle")
    assert lapses(core, late) == []
    beat(core, late + 0.1, "idle")
    assert lapses(core, late + 0.2) == [("idle", ["t1", "t2"], True)]
    again = core.decide(late + 0.3)
    assert [d.node.name for d in again if d.node] == ["good", "good"]
    notes = {c.node: (c.feasible, c.note) for c in again[0].explanation.candidates}
    assert notes["idle"] == (False, "distrusted: for 5.1 s it took up none of 2")
    assert lapses(core, late + 0.4) == []


def test_what_waits_behind_others_is_explained_and_a_slot_that_comes_free_begins_anew() -> None:
    core = core_with(Scripted(), info("n", slots=1))
    for n in range(2):
        core.handle(submitted(f"t{n}", deadline=100 + n))
    decided(core, 0.0)
    claimed(core, "t0", "n", 0.1)
    beat(core, 60.0, "n")
    assert lapses(core, 60.0) == []
    core.handle(completed("t0", "n", 61.0))
    beat(core, 61.0 + LEAST_PATIENCE - 0.1, "n")
    assert lapses(core, 99.0) == []
    beat(core, 61.0 + LEAST_PATIENCE + 0.1, "n")
    assert lapses(core, 99.0) == [("n", ["t1"], True)]


def test_a_message_that_later_ones_overtook_was_lost_and_its_node_is_trusted() -> None:
    core = core_with(Scripted(), info("n", slots=4))
    core.handle(submitted("lost"))
    decided(core, 0.0)
    for n, at in enumerate((1.0, 1.9, 2.1)):
        assert lapses(core, at) == []  # messages may come in any order
        core.handle(submitted(f"t{n}"))
        decided(core, at)
        claimed(core, f"t{n}", "n", at + 0.1)
    assert lapses(core, 2.2) == [("n", ["lost"], False)]
    assert decided(core, 2.3) == {"lost": "n"}  # there is no other


def test_trust_comes_back_one_task_then_two() -> None:
    core = core_with(Scripted(), info("n", slots=4))
    core.handle(submitted("t"))
    decided(core, 0.0)
    beat(core, FIRST_PATIENCE + 1, "n")
    assert lapses(core, FIRST_PATIENCE + 1)
    for n in range(9):
        core.handle(submitted(f"s{n}", deadline=200))
    now = FIRST_PATIENCE + 1
    assert decided(core, now) == {}
    now += FIRST_PATIENCE + 0.1
    core.lapses(now)  # it is looked at every so often
    assert decided(core, now) == {"t": "n"}
    claimed(core, "t", "n", now + 0.1, attempt=2)
    assert len(decided(core, now + 0.1)) == 2
    for n in range(2):
        claimed(core, f"s{n}", "n", now + 0.2)
    assert len(decided(core, now + 0.3)) == 3  # it is trusted, and full
    assert not core.cluster.nodes["n"].pace.distrust


def test_a_node_that_claims_now_and_then_costs_ever_fewer_tasks() -> None:
    """As one whose tasks somebody allows at two a minute: most go elsewhere at once."""
    core = core_with(Scripted(Place("slow")), info("slow", slots=8))
    lost, now, number, next_claim = 0, 0.0, 0, 0.0
    while now < 600:
        core.handle(submitted(f"t{number}", at=now, deadline=now + 60))
        number += 1
        placed = core.decide(now)
        for decision in placed:
            if now >= next_claim:
                claimed(core, decision.task.id, "slow", now + 0.1, attempt=decision.task.attempt)
                core.handle(completed(decision.task.id, "slow", now + 0.2, attempt=decision.task.attempt))
                next_claim = now + 30
        beat(core, now + 0.5, "slow")
        lost += sum(len(tasks) for _, tasks, _ in lapses(core, now + 0.6))
        core.keep_only(set())
        now += 1.0
    assert number == 600
    assert lost < 60


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_patience_is_bounded_and_above_what_was_seen_of_a_steady_node(delays: list[float]) -> None:
    pace = Pace()
    assert pace.patience == FIRST_PATIENCE
    for delay in delays:
        pace.claimed(delay, 4)
        assert LEAST_PATIENCE <= pace.patience <= MOST_PATIENCE
    steady = Pace()
    for _ in range(50):
        steady.claimed(delays[0], 4)
    assert steady.patience >= min(delays[0], MOST_PATIENCE)


def test_pauses_double_and_are_bounded() -> None:
    pace, pauses = Pace(mean=0.01), []
    for _ in range(12):
        pace.lapsed(0.0, "it sleeps")
        pauses.append(pace.rests_until)
    assert pauses[:3] == pytest.approx([LEAST_PATIENCE, 2 * LEAST_PATIENCE, 4 * LEAST_PATIENCE])
    assert pauses[-1] == LONGEST_PAUSE
    assert not pace.trusts(0, LONGEST_PAUSE - 1)
    assert pace.trusts(0, LONGEST_PAUSE)
    assert not pace.trusts(1, LONGEST_PAUSE)
