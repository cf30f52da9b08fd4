"""Thompson sampling over nodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from perllm.scheduler.baselines.on_time_reward import NodeRewards
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class Thompson(NodeRewards):
    """Thompson sampling on Beta posteriors of the nodes' rewards, from a uniform prior (Thompson 1933)."""

    name = "thompson"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        counts = [self.arms.get(node.name, (0.0, 0.0)) for node in candidates]
        drawn = [self.rng.beta(1 + rewards, 1 + n - rewards) for n, rewards in counts]
        return Place(candidates[int(np.argmax(drawn))].name)
