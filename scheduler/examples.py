"""Made-up nodes, tasks and completions, for the warm-up, the benchmarks and the tests.

Fields not given are those of a small node, and of a short chat; whoever needs others gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perllm.broker.capabilities import BEFORE_CAPABILITIES
from perllm.broker.messages import Completed, Energy, ModelOffer, NodeInfo, Power, Receipt, State, StepCost, Submitted
from perllm.scheduler.core.cluster import Task
from perllm.scheduler.core.scheduler import task_of

STEP_COST = StepCost(step=0.02, sequence=0.001, prefill=1e-4)
MODEL = "m"


def node_info(
    name: str,
    *,
    boot: str | None = None,
    slots: int = 4,
    models: Sequence[str] = (MODEL,),
    context: int = 4096,
    kv_tokens: int = 65_536,
    chunk: int | None = None,
    step_cost: StepCost = STEP_COST,
    capabilities: Sequence[str] = BEFORE_CAPABILITIES,
    power: Power | None = None,
    **fields: Any,
) -> NodeInfo:
    """A node that registers; it offers `models`, all alike. `fields` are NodeInfo's other ones."""
    return NodeInfo(
        name=name,
        boot=boot or f"{name}.1",
        slots=slots,
        models=tuple(
            ModelOffer(
                name=m,
                context=context,
                kv_tokens=kv_tokens,
                chunk=chunk,
                calibration=step_cost,
                capabilities=tuple(capabilities),
            )
            for m in models
        ),
        power=power or Power(idle=10, active=100, method="emulated", estimated=True),
        **{"tier": "edge", "bandwidth": 1e7, "engine": "none"} | fields,
    )


def submitted(task_id: str, *, at: float = 0.0, left: float = 10.0, **fields: Any) -> Submitted:
    """A task that comes `at` s with `left` s to its deadline."""
    sizes = {"prompt_tokens": 50, "payload_bytes": 1000, "max_tokens": 200}
    return Submitted(id=task_id, at=at, deadline=at + left, **sizes | fields)


def task(task_id: str, **fields: Any) -> Task:
    """The same as the core holds it. `fields` as for `submitted`."""
    return task_of(submitted(task_id, **fields))


def completed(task_id: str, node: str, *, at: float, attempt: int = 1, **receipt: Any) -> Completed:
    """A task that ended on time on a node. `receipt` are Receipt's other fields."""
    energy = Energy(inference=receipt.pop("joules", 2.0), method="emulated", estimated=True)
    return Completed(
        id=task_id,
        node=node,
        attempt=attempt,
        at=at,
        state=State.SUCCEEDED,
        on_time=True,
        latency=1.0,
        queued=0.1,
        receipt=Receipt(node=node, attempt=attempt, **{"model": MODEL, "energy": energy} | receipt),
    )
