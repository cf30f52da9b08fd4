"""Least loaded."""

from __future__ import annotations

from support.baselines import cluster, node, placed, task

from perllm.scheduler.policies import make_policy


def test_least_loaded_counts_per_slot() -> None:
    three = cluster(node("a", held=1), node("b", held=2, slots=16), node("c", held=2))
    assert placed(make_policy("least-loaded"), task(), three) == "b"
