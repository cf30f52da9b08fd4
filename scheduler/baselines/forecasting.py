"""Heuristics on the calibration's forecast: earliest completion, and the cheapest node that meets the deadline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from perllm.broker.messages import Candidate, Event
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.forecast import MeanLength, forecast
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place


class _Forecasting(Baseline):
    """Knows mean output lengths per class, and nothing else that is learned."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.lengths = MeanLength()

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self.lengths.observe(event, task)

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        left = task.deadline - now
        looks = []
        for node in candidates:
            seen = forecast(node, task, self.lengths)
            note = f"expected {seen.finish:.2f} s of {left:.2f} s, {seen.energy:.0f} J"
            looks.append(
                Candidate(
                    node=node.name,
                    feasible=seen.finish <= left,
                    finish=seen.finish,
                    marginal_energy=seen.energy,
                    slacks={"deadline": (left - seen.finish) / left},
                    note=note,
                )
            )
        return tuple(looks)

    @override
    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "lengths": self.lengths.snapshot()}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        lengths = MeanLength.restored(state["lengths"])
        super().restore(state)
        self.lengths = lengths


class EarliestCompletion(_Forecasting):
    """The node that is forecast to finish it first."""

    name = "earliest-completion"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        return Place(min(candidates, key=lambda n: forecast(n, task, self.lengths).finish).name)


class CheapestFeasible(_Forecasting):
    """The node with the least forecast energy among those forecast to meet the deadline; the earliest if none is."""

    name = "cheapest-feasible"

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        seen = [(forecast(n, task, self.lengths), n) for n in candidates]
        meets = [pair for pair in seen if pair[0].finish <= task.deadline - now]
        if meets:
            return Place(min(meets, key=lambda pair: pair[0].energy)[1].name)
        return Place(min(seen, key=lambda pair: pair[0].finish)[1].name)
