"""Least loaded: join the shortest queue, relative to what a node can hold."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


def load(node: Node) -> float:
    """Tasks held per slot."""
    return node.taken / node.info.slots


class LeastLoaded(Baseline):
    """The candidate with the fewest tasks per slot: join the shortest queue (Winston 1977). The first of equals."""

    name = "least-loaded"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        return Place(min(candidates, key=load).name)
