"""What the policies that use one tier only share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from typing_extensions import override

from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.least_loaded import load
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Wait


class OneTier(Baseline):
    """The least loaded node of `tier`; waits while none of that tier has room."""

    tier: ClassVar[Literal["edge", "cloud"]]

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        of_tier = [n for n in candidates if n.info.tier == self.tier]
        return Place(min(of_tier, key=load).name) if of_tier else Wait()
