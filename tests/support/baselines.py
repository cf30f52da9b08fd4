"""What the baselines' tests share: a cluster made by hand, and tasks placed on it and completed."""

from __future__ import annotations

from typing import Any

from perllm.broker.messages import Completed, Counters, Power, State, StepCost
from perllm.scheduler import examples
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Place, Policy


def node(
    name: str, *, tier: Any = "edge", step: float = 0.05, slots: int = 4, watts: float = 40, held: int = 0
) -> Node:
    info = examples.node_info(
        name,
        tier=tier,
        slots=slots,
        kv_tokens=8192,
        step_cost=StepCost(step=step, sequence=step / 20, prefill=step / 50),
        power=Power(idle=10, active=watts, joules_per_byte=1e-7, method="cpu-model", estimated=True),
    )
    made = Node(info, since=0.0)
    for i in range(held):
        flight = task(f"{name}-{i}")
        flight.node, flight.dispatched = name, 0.0
        made.hold(flight, 0.0)
    return made


def task(name: str = "t", *, left: float = 5.0, prompt: int = 200, service: str = "s", payload: int = 1000) -> Task:
    return examples.task(name, left=left, service=service, prompt_tokens=prompt, payload_bytes=payload, max_tokens=100)


def completed(
    t: Task, where: str, *, at: float, joules: float = 10.0, tokens: int = 50, cut: bool = False
) -> Completed:
    event = examples.completed(
        t.id,
        where,
        at=at,
        joules=joules,
        prompt_tokens=t.prompt_tokens,
        completion_tokens=tokens,
        before=Counters(),
        after=Counters(),
    )
    ended = {
        "state": State.EXPIRED if cut else State.SUCCEEDED,
        "on_time": not cut and at <= t.deadline,
        "latency": at - t.submitted,
        "queued": 0.0,
    }
    return event.model_copy(update=ended)


def cluster(*nodes: Node) -> Cluster:
    return Cluster({n.name: n for n in nodes})


def placed(policy: Policy, t: Task, where: Cluster, now: float = 0.0) -> str:
    """The node the policy places the task on."""
    choice = policy.choose(t, list(where.nodes.values()), where, now)
    assert isinstance(choice, Place), choice
    return choice.node


def place(policy: Policy, t: Task, where: Cluster) -> str:
    """The same, and the task is there."""
    t.node, t.dispatched, t.attempt = placed(policy, t, where), 0.0, 1
    return t.node


def feed(policy: Policy, where: Cluster, name: str, *, at: float, joules: float = 10.0, **task_args: Any) -> None:
    """One task placed on `name` at time 0 and completed at `at`."""
    t = task(f"fed-{id(task_args)}-{at}-{name}-{joules}", **task_args)
    t.node, t.dispatched, t.attempt = name, 0.0, 1
    policy.observe(completed(t, name, at=at, joules=joules), t, where)
