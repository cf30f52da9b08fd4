"""Earliest completion."""

from __future__ import annotations

from support.baselines import cluster, node, placed, task

from perllm.scheduler.policies import make_policy


def test_earliest_completion_takes_the_fastest_whatever_it_costs() -> None:
    two = cluster(node("slow", step=0.05, watts=5), node("fast", tier="cloud", step=0.01, watts=400))
    assert placed(make_policy("earliest-completion"), task(left=30.0), two) == "fast"
