"""One tier only: the edge, the cloud, and the cloud with FineInfer's deferred continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from typing_extensions import override

from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.least_loaded import load
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Wait


class _OneTier(Baseline):
    """The least loaded node of one tier; waits while none of that tier has room."""

    tier: ClassVar[Literal["edge", "cloud"]]

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        mine = [n for n in candidates if n.info.tier == self.tier]
        return Place(min(mine, key=load).name) if mine else Wait()


class EdgeOnly(_OneTier):
    """Never the cloud."""

    name = "edge-only"
    tier = "edge"


class CloudOnly(_OneTier):
    """Never an edge."""

    name = "cloud-only"
    tier = "cloud"


class FineInfer(CloudOnly):
    """Deferred continuous batching (FineInfer, EuroMLSys 2024): tasks gather until the first of them has waited
    `deferral` s, then all start together on the cloud."""

    name = "fineinfer"
    state_fields = ("opened", "released")

    def __init__(self, seed: int = 0, *, deferral: float = 1.0) -> None:
        super().__init__(seed)
        self.deferral = deferral
        self.opened: float | None = None  # when the first task of the gathering batch came, s
        self.released: float | None = None  # when the last batch was let go, s

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        if self.released != now:
            if self.opened is None:
                self.opened = task.submitted
            if now - self.opened < self.deferral:
                return Wait()
            self.opened, self.released = None, now
        return super().choose(task, candidates, cluster, now)
