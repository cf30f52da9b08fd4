"""UCB1 over nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.on_time_reward import NodeRewards
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class Ucb1(NodeRewards):
    """UCB1 on the nodes' mean rewards: mean + sqrt(2 ln t / n), untried nodes first (Auer et al. 2002)."""

    name = "ucb1"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        total = sum(n for n, _ in self.arms.values())

        def index(node: Node) -> float:
            n, rewards = self.arms.get(node.name, (0.0, 0.0))
            return math.inf if n == 0 else rewards / n + math.sqrt(2 * math.log(total) / n)

        return Place(max(candidates, key=index).name)
