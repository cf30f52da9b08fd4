"""When a node would finish a task, from its boot-time calibration and what it holds: the heuristics' forecast.

It is deliberately plain: the mean output length per class, one constant step time per node. CS-UCB has a better one
(`perllm.scheduler.csucb.forecast`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from perllm.broker.messages import Candidate, Event
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.mean_length import MeanLength
from perllm.scheduler.core.cluster import Cluster, Node, Task


@dataclass(frozen=True, slots=True)
class Forecast:
    """One node's prospects for one task, s and J. `alone` leaves out everything else on the node."""

    finish: float
    alone: float
    energy: float


def forecast(node: Node, task: Task, lengths: MeanLength) -> Forecast:
    """Predict `task` on `node`: transfer, its turn in the queue, prefill, then decoding beside what is there.

    A queued task starts when one of the `slots` running ones has ended; each holds its slot for its prefill and its
    mean output. Energy is busy power over the time this task adds to the node's steps.
    """
    offer = node.offer(task.demand)
    assert offer is not None  # candidates serve the task
    cost, slots, held = offer.calibration, node.info.slots, node.taken
    tokens = lengths.tokens(task)
    prefill = cost.prefill * task.prompt_tokens
    context = cost.context * (task.prompt_tokens + tokens / 2)
    transfer = task.payload_bytes / node.info.bandwidth
    alone = transfer + prefill + tokens * (cost.step + cost.sequence + context)
    own = min(task.n, slots)  # answers at a time
    tokens *= task.n / own
    active = min(held + own, slots)
    # In a batch, everyone waits for everyone's prefill: it takes this share of the node's time.
    step = cost.step + active * (cost.sequence + context + prefill / max(tokens, 1.0))
    service = transfer + prefill + tokens * step
    wait = max(0, held + 1 - slots) / slots * service
    energy = node.info.power.active * (prefill + tokens * step * own / active)
    return Forecast(wait + service, alone, energy + task.payload_bytes * node.info.power.joules_per_byte)


class ForecastingBaseline(Baseline):
    """A baseline that chooses by this forecast: it learns mean output lengths, and nothing else."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.lengths = MeanLength()

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self.lengths.observe(event, task)

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        left = task.deadline - now
        explained = []
        for node in candidates:
            expected = forecast(node, task, self.lengths)
            explained.append(
                Candidate(
                    node=node.name,
                    feasible=expected.finish <= left,
                    finish=expected.finish,
                    marginal_energy=expected.energy,
                    slacks={"deadline": (left - expected.finish) / left},
                    note=f"expected {expected.finish:.2f} s of {left:.2f} s, {expected.energy:.0f} J",
                )
            )
        return tuple(explained)

    @override
    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "lengths": self.lengths.snapshot()}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        lengths = MeanLength.restored(state["lengths"])
        super().restore(state)
        self.lengths = lengths
