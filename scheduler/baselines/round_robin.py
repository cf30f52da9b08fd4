"""Round robin: each node in turn."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class RoundRobin(Baseline):
    """The candidates in turn."""

    name = "round-robin"
    state_fields = ("turn",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.turn = 0

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        node = candidates[self.turn % len(candidates)]
        self.turn += 1
        return Place(node.name)
