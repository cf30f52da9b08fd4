"""Round robin."""

from __future__ import annotations

from support.baselines import cluster, node, placed, task

from perllm.scheduler.policies import make_policy


def test_round_robin_takes_turns() -> None:
    three = cluster(node("a", held=1), node("b", held=2, slots=16), node("c", held=2))
    policy = make_policy("round-robin")
    assert [placed(policy, task(str(i)), three) for i in range(4)] == ["a", "b", "c", "a"]
