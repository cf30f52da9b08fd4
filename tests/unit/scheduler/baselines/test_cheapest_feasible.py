"""Cheapest feasible."""

from __future__ import annotations

from support.baselines import cluster, feed, node, placed, task

from perllm.scheduler.policies import make_policy


def test_cheapest_feasible_pays_only_for_what_the_deadline_needs() -> None:
    slow_cheap, fast_dear = node("slow", step=0.05, watts=5), node("fast", tier="cloud", step=0.01, watts=400)
    two = cluster(slow_cheap, fast_dear)
    policy = make_policy("cheapest-feasible")
    for _ in range(20):
        feed(policy, two, "slow", at=1.0)
    assert placed(policy, task(left=30.0), two) == "slow"
    assert placed(policy, task(left=2.0), two) == "fast"
    assert placed(policy, task(left=0.1), two) == "fast"  # none is in time: the earliest
