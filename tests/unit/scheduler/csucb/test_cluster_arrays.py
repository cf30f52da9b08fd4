"""The cluster as arrays: whatever happens to a node's tasks, its rows are those new arrays would have."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from perllm.scheduler import examples
from perllm.scheduler.core.cluster import Demand, Node, Task
from perllm.scheduler.csucb.cluster_arrays import ArmEstimate, ClusterArrays, NodeEstimate
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.usual_costs import UsualCosts


def node(name: str, models: int = 1) -> Node:
    return Node(examples.node_info(name, slots=3, models=[f"m{i}" for i in range(models)]), since=0.0)


def task(number: int) -> Task:
    return examples.task(f"t{number}", left=100.0 + number, prompt_tokens=10 + number, payload_bytes=number)


def arrays() -> ClusterArrays:
    def estimate(of: Node) -> NodeEstimate:
        return NodeEstimate(
            arms=tuple(ArmEstimate(0.02, 0.001, 1e-4, 0.0, 0.1) for _ in of.info.models),
            watts=1.0,
            bandwidth=1e7,
            latency=0.0,
            dispatch_delay=0.0,
            stalled=False,
            arrival_rate=0.0,
            arrival_prompt=100.0,
            arrival_output=60.0,
            slot_price=0.0,
            stay=0.0,
            throughput=1.0,
        )

    return ClusterArrays(Lengths(), UsualCosts(), estimate)


#: Given, and the same however the tasks came there (rows of lengths are numbered as first asked for).
GIVEN = ["dispatched", "claimed", "generated", "prompt_tokens", "payload_bytes", "deadline", "max_tokens", "value"]


def rows_of(of: ClusterArrays, a: Node) -> np.ndarray:
    (candidate,) = of.offers((a,), Demand())
    first, count = of.nodes[candidate["node"]][["first", "count"]].item()
    return of.in_flight[first : first + count][GIVEN]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "again", "read", "move"]), st.integers(0, 9)), max_size=40))
def test_rows_follow_the_tasks(happenings: list[tuple[str, int]]) -> None:
    kept, a = arrays(), node("a")
    other = node("b")
    other.in_flight = {f"x{i}": task(50 + i) for i in range(3)}
    kept.offers((a, other), Demand())
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
        if what == "read" or which % 2:
            rows_of(kept, a)
    assert np.array_equal(rows_of(kept, a), rows_of(arrays(), a))
    assert rows_of(kept, other)["prompt_tokens"].tolist() == [60.0, 61.0, 62.0]


def test_a_gap_is_closed() -> None:
    kept, a = arrays(), node("a")
    a.in_flight = {f"t{i}": task(i) for i in range(5)}
    a.touch(1.0)
    assert rows_of(kept, a)["prompt_tokens"].tolist() == [10, 11, 12, 13, 14]
    del a.in_flight["t1"], a.in_flight["t3"]
    a.in_flight["t9"] = task(9)
    a.touch(2.0)
    assert rows_of(kept, a)["prompt_tokens"].tolist() == [10, 12, 14, 19]


def test_nothing_is_worked_out_twice_and_a_change_is_seen() -> None:
    kept, a = arrays(), node("a")
    kept.offers((a,), Demand())
    a.in_flight["t"] = task(1)
    assert len(rows_of(kept, a)) == 0  # not said to have changed
    a.touch(1.0)
    assert len(rows_of(kept, a)) == 1


def test_each_model_of_a_node_has_its_arm() -> None:
    kept, a, b = arrays(), node("a", models=2), node("b", models=2)
    first, second = kept.offers((a, b), Demand()), kept.offers((a, b), Demand("m1"))
    assert (second["arm"] - first["arm"]).tolist() == [1, 1]


def test_nodes_that_come_and_go_do_not_fill_the_memory() -> None:
    kept = arrays()
    for i in range(3000):
        kept.offers((node(f"n{i}"),), Demand())
    for _ in range(3000):
        kept.offers((node("same"),), Demand())
    assert len(kept._entries) < 200
    assert len(kept.arms) < 1000
