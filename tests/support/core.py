"""A core whose policy answers what a test tells it to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perllm.broker.messages import Candidate, Completed, Event, NodeInfo, NodeUp, Submitted
from perllm.scheduler import examples
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Policy
from perllm.scheduler.core.scheduler import SchedulerCore
from perllm.scheduler.examples import node_info


def info(name: str, slots: int = 2, models: Sequence[str] = ("m",), context: int = 4096, **fields: Any) -> NodeInfo:
    return node_info(name, slots=slots, models=models, context=context, **fields)


def submitted(task_id: str, at: float = 0.0, deadline: float = 100.0, **fields: Any) -> Submitted:
    return Submitted(id=task_id, at=at, deadline=deadline, **fields)


def completed(task_id: str, node: str, at: float, attempt: int = 1) -> Completed:
    return examples.completed(task_id, node, at=at, attempt=attempt)


class Scripted(Policy):
    """Answers what it is told to and keeps what it was asked."""

    name = "scripted"

    def __init__(self, answer: Choice | None = None) -> None:
        self.answer = answer
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        self.asked.append((task.id, tuple(n.name for n in candidates)))
        return self.answer or Place(candidates[0].name)

    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        pass

    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        return tuple(Candidate(node=n.name) for n in candidates)

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def core_with(policy: Scripted, *infos: NodeInfo) -> SchedulerCore:
    core = SchedulerCore(policy)
    for one in infos:
        core.handle(NodeUp(at=0, info=one))
    return core
