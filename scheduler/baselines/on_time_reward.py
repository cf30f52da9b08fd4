"""What the textbook bandits learn from: a reward of 1 for a task on time, else 0, and its mean per node."""

from __future__ import annotations

from typing_extensions import override

from perllm.broker.messages import Completed, Ended, Event, State
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Task


def on_time_reward(event: Event) -> tuple[str, float] | None:
    """The node and the reward an event reports; None for other events."""
    match event:
        case Completed():
            return event.node, float(event.on_time)
        case Ended(state=State.EXPIRED, node=str(node)):
            return node, 0.0
        case _:
            return None


class NodeRewards(Baseline):
    """Counts rewards per node: `arms[node]` is [n, Σ reward]. Subclasses give `choose`."""

    state_fields = ("arms",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.arms: dict[str, list[float]] = {}

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        if (rewarded := on_time_reward(event)) is not None:
            node, reward = rewarded
            arm = self.arms.setdefault(node, [0.0, 0.0])
            arm[0] += 1
            arm[1] += reward
