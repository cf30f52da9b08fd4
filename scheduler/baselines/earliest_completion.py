"""Earliest completion: where the task is forecast to be done first."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.calibrated_forecast import ForecastingBaseline, forecast
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class EarliestCompletion(ForecastingBaseline):
    """The node forecast to finish it first, queue included (minimum completion time, Maheswaran et al. 1999)."""

    name = "earliest-completion"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        return Place(min(candidates, key=lambda n: forecast(n, task, self.lengths).finish).name)
