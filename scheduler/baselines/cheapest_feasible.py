"""Cheapest feasible: the least energy that the deadline allows."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from perllm.scheduler.baselines.calibrated_forecast import ForecastingBaseline, forecast
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class CheapestFeasible(ForecastingBaseline):
    """The node with the least forecast energy among those forecast to meet the deadline; the earliest if none is."""

    name = "cheapest-feasible"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        forecasts = [(forecast(n, task, self.lengths), n) for n in candidates]
        feasible = [pair for pair in forecasts if pair[0].finish <= task.deadline - now]
        if feasible:
            return Place(min(feasible, key=lambda pair: pair[0].energy)[1].name)
        return Place(min(forecasts, key=lambda pair: pair[0].finish)[1].name)
