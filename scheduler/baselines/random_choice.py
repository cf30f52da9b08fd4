"""Random: any candidate."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class Random(Baseline):
    """A candidate drawn at random, each as likely."""

    name = "random"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        return Place(candidates[int(self.rng.integers(len(candidates)))].name)
