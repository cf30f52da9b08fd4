"""Power of two choices."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.least_loaded import load
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class PowerOfTwo(Baseline):
    """Of two candidates drawn at random, the one with fewer tasks per slot (Mitzenmacher 2001)."""

    name = "power-of-two"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        drawn = self.rng.choice(len(candidates), size=min(2, len(candidates)), replace=False)
        return Place(min((candidates[int(i)] for i in drawn), key=load).name)
