"""FineInfer's deferred continuous batching, on the cloud."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.cloud_only import CloudOnly
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Wait


class FineInfer(CloudOnly):
    """Cloud only, tasks gathered into batches: deferred continuous batching (FineInfer, EuroMLSys 2024).

    Tasks wait until the first of a batch has waited `deferral` s, then all start together.
    """

    name = "fineinfer"
    state_fields = ("batch_began", "released")

    def __init__(self, seed: int = 0, *, deferral: float = 1.0) -> None:
        super().__init__(seed)
        self.deferral = deferral
        self.batch_began: float | None = None  # when the first task of the gathering batch came, s
        self.released: float | None = None  # when the last batch was released, s

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        if self.released != now:
            if self.batch_began is None:
                self.batch_began = task.submitted
            if now - self.batch_began < self.deferral:
                return Wait()
            self.batch_began, self.released = None, now
        return super().choose(task, candidates, cluster, now)
