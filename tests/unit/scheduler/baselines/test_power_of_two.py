"""Power of two choices."""

from __future__ import annotations

from support.baselines import cluster, node, placed, task

from perllm.scheduler.policies import make_policy


def test_power_of_two_never_takes_the_fullest_of_three() -> None:
    three = cluster(node("a"), node("b", held=3), node("c", held=1))
    policy = make_policy("power-of-two", 3)
    seen = {placed(policy, task(str(i)), three) for i in range(100)}
    assert seen == {"a", "c"}
