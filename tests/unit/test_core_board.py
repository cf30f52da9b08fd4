"""The cluster as arrays: whatever happens to a node's tasks, its rows are those a fresh look would give."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from perllm.broker.messages import ModelOffer, NodeInfo, Power, StepCost
from perllm.scheduler.core.cluster import Node, Task
from perllm.scheduler.csucb import forecast as f
from perllm.scheduler.csucb.cluster_arrays import ClusterArrays, Learned
from perllm.scheduler.csucb.output_lengths import Lengths

GIVEN = f.ARM + 1


def node(name: str, models: int = 1) -> Node:
    cal = StepCost(step=0.02, sequence=0.001, prefill=1e-4)
    info = NodeInfo(
        name=name,
        tier="edge",
        boot=name,
        slots=3,
        models=tuple(ModelOffer(name=f"m{i}", context=4096, kv_tokens=9999, calibration=cal) for i in range(models)),
        power=Power(idle=0, active=1, method="emulated", estimated=True),
        bandwidth=1e7,
        engine="test",
    )
    return Node(info, since=0.0)


def task(number: int, model: str | None = None) -> Task:
    return Task(
        id=f"t{number}",
        submitted=0.0,
        deadline=100.0 + number,
        value=1.0,
        service="chat",
        model=model,
        prompt_tokens=10 + number,
        payload_bytes=number,
        max_tokens=64,
    )


def board() -> ClusterArrays:
    def learned(of: Node) -> Learned:
        steps = tuple((0.02, 0.001, 1e-4, 0.0, 0.1) for _ in of.info.models)
        return Learned(steps, 1.0, 1e7, 0.0, 0.0, False, (0.0, 100.0, 60.0), 0.0, 1.0)

    return ClusterArrays(Lengths(), learned)


def rows_of(of: ClusterArrays, a: Node) -> np.ndarray:
    (row,), _ = of.rows((a,), None)
    first, count = int(of.nodes[row, f.FIRST]), int(of.nodes[row, f.COUNT])
    return np.delete(
        of.in_flight[first : first + count, :GIVEN], f.LENGTH, axis=1
    )  # rows of lengths: as first asked for


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "again", "look", "move"]), st.integers(0, 9)), max_size=40))
def test_rows_follow_the_tasks(happenings: list[tuple[str, int]]) -> None:
    kept, a = board(), node("a")
    other = node("b")
    other.in_flight = {f"x{i}": task(50 + i) for i in range(3)}
    kept.rows((a, other), None)
    for number, (what, which) in enumerate(happenings):
        ids = list(a.in_flight)
        if what == "add":
            a.in_flight[f"t{number}"] = task(number)
        elif ids and what == "drop":
            del a.in_flight[ids[which % len(ids)]]
        elif ids and what == "again":
            a.in_flight[ids[which % len(ids)]] = a.in_flight.pop(ids[which % len(ids)])
        elif ids and what == "move":
            a.in_flight[ids[which % len(ids)]].generated += which
            a.heard = float(number)
        a.touch(float(number))
        if what == "look" or which % 2:
            rows_of(kept, a)
    assert np.array_equal(rows_of(kept, a), rows_of(board(), a))
    assert rows_of(kept, other)[:, f.PROMPT].tolist() == [60.0, 61.0, 62.0]


def test_a_gap_is_closed() -> None:
    kept, a = board(), node("a")
    a.in_flight = {f"t{i}": task(i) for i in range(5)}
    a.touch(1.0)
    assert rows_of(kept, a)[:, f.PROMPT].tolist() == [10, 11, 12, 13, 14]
    del a.in_flight["t1"], a.in_flight["t3"]
    a.in_flight["t9"] = task(9)
    a.touch(2.0)
    assert rows_of(kept, a)[:, f.PROMPT].tolist() == [10, 12, 14, 19]


def test_nothing_is_worked_out_twice_and_a_change_is_seen() -> None:
    kept, a = board(), node("a")
    kept.rows((a,), None)
    a.in_flight["t"] = task(1)
    assert len(rows_of(kept, a)) == 0  # not said to have changed
    a.touch(1.0)
    assert len(rows_of(kept, a)) == 1


def test_each_model_of_a_node_has_its_arm() -> None:
    kept, a, b = board(), node("a", models=2), node("b", models=2)
    _, first = kept.rows((a, b), None)
    _, second = kept.rows((a, b), "m1")
    assert (second - first).tolist() == [1, 1]


def test_nodes_that_come_and_go_do_not_fill_the_memory() -> None:
    kept = board()
    for i in range(3000):
        kept.rows((node(f"n{i}"),), None)
    for _ in range(3000):
        kept.rows((node("same"),), None)
    assert len(kept._entries) < 200
    assert len(kept.arms) < 1000
