"""When a node would finish a task, from its boot-time calibration and what it holds: the simple heuristics' forecast.

It is deliberately plain: the mean output length per class, one constant step time per node. The state-aware core has
a better one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perllm.broker.messages import Completed, Event, State
from perllm.scheduler.core.cluster import Node, Task
from perllm.scheduler.core.service_classes import Classes

#: Output length assumed for a class of which nothing has finished yet, as a share of `max_tokens`.
PRIOR_SHARE = 0.5


class MeanLength:
    """Mean output length per service class, tokens. `sums` has [finished tasks, their tokens] of each class."""

    def __init__(self) -> None:
        self.sums: Classes[list[float]] = Classes(lambda: [0.0, 0.0])

    def snapshot(self) -> list[Any]:
        """[tenant, class, sums] of each class, as JSON-able data of their own."""
        return [[tenant, service, list(sums)] for tenant, service, sums in self.sums]

    @classmethod
    def restored(cls, state: list[Any]) -> MeanLength:
        """From what `snapshot` returned."""
        known = cls()
        for tenant, service, sums in state:
            known.sums.put(tenant, service, [float(x) for x in sums])
        return known

    def observe(self, event: Event, task: Task | None) -> None:
        """Count a task that ran to its end; one cut at its deadline says only that it was longer."""
        if isinstance(event, Completed) and task is not None and event.state is State.SUCCEEDED:
            entry = self.sums.get(task.tenant, task.service)
            entry[0] += 1
            entry[1] += event.receipt.completion_tokens

    def tokens(self, task: Task) -> float:
        """Expected output of `task`, tokens."""
        count, total = self.sums.get(task.tenant, task.service)
        prior = task.max_tokens * PRIOR_SHARE
        return min((total + prior) / (count + 1), task.max_tokens)


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
    offer = node.info.offer(task.model)
    assert offer is not None  # candidates offer the model
    cal, slots, held = offer.calibration, node.info.slots, len(node.in_flight)
    tokens = lengths.tokens(task)
    prefill = cal.prefill * task.prompt_tokens
    context = cal.context * (task.prompt_tokens + tokens / 2)
    transfer = task.payload_bytes / node.info.bandwidth
    alone = transfer + prefill + tokens * (cal.step + cal.sequence + context)
    active = min(held + 1, slots)
    # In a batch, everyone waits for everyone's prefill: it takes this share of the node's time.
    step = cal.step + active * (cal.sequence + context + prefill / max(tokens, 1.0))
    service = transfer + prefill + tokens * step
    wait = max(0, held + 1 - slots) / slots * service
    energy = node.info.power.active * (prefill + tokens * step / active)
    return Forecast(wait + service, alone, energy + task.payload_bytes * node.info.power.joules_per_byte)
