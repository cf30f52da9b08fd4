"""Admission for policies that have none: part of what `+mech` adds to a baseline.

The other mechanisms (EDF, short node queues, dropping late tasks, abort at the deadline) are the core's and the
worker's; with this one a baseline meets CS-UCB on equal terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from perllm.broker.messages import Candidate, Event
from perllm.scheduler.baselines.calibrated_forecast import forecast
from perllm.scheduler.baselines.mean_length import MeanLength
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Policy, Reject, Wait


class WithAdmission(Policy):
    """Decides whether, never where: `policy` chooses as it always does, once some node is forecast to finish the task
    in time. Until one is, the task waits; it is refused when no node could, even with nothing else to do."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.name = f"{policy.name}+mech"
        self.lengths = MeanLength()

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        left = task.deadline - now
        if any(forecast(node, task, self.lengths).finish <= left for node in candidates):
            return self.policy.choose(task, candidates, cluster, now)
        serving = cluster.serving(task.demand)
        soonest = min(forecast(node, task, self.lengths).alone for node in serving)
        if soonest > left:
            return Reject(f"even an empty node would take {soonest:.2f} s of the {left:.2f} s left")
        return Wait()

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self.lengths.observe(event, task)
        self.policy.observe(event, task, cluster)

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        return self.policy.explain(task, candidates, cluster, now)

    @override
    def snapshot(self) -> dict[str, Any]:
        return {"lengths": self.lengths.snapshot(), "policy": self.policy.snapshot()}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        lengths = MeanLength.restored(state["lengths"])
        self.policy.restore(state["policy"])
        self.lengths = lengths
