"""RewardlessGuidance: placement by active inference, without a reward (one of PerLLM's baselines).

A re-implementation from the public description (active inference for LLM inference offloading in cloud-edge computing,
IEEE Transactions on Mobile Computing 2024), not the authors' code. The agent believes that what comes of placing a task
on a node depends on the node and on what it can see: how full the node is, how long the prompt, how near the deadline.
Its beliefs are Dirichlet counts of outcomes; it prefers some outcomes a priori, and places each task where the expected
free energy is least: the surprise of what it expects under what it prefers, less what it would learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from typing_extensions import override

from perllm.broker.messages import Candidate, Completed, Ended, Event, State
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place

#: What can come of a task: late, on time for more than the mean energy, on time for less.
LATE, EXPENSIVE, CHEAP = range(3)
#: Log preference of each.
PREFERENCE = (-4.0, -0.5, 0.0)
#: Dirichlet counts before anything was seen.
PRIOR = (0.5, 0.5, 0.5)


class RewardlessGuidance(Baseline):
    """Active inference, without a reward: the least expected free energy (RewardlessGuidance, IEEE TMC 2024).

    argmin over nodes of G = E[−ln C(o)] − novelty, o drawn from the believed outcomes in this context.
    """

    name = "rewardless-guidance"
    state_fields = ("counts", "placed", "mean_energy")

    def __init__(self, seed: int = 0, *, curiosity: float = 1.0) -> None:
        super().__init__(seed)
        self.curiosity = curiosity
        self.counts: dict[str, list[float]] = {}  # context → Dirichlet counts of the outcomes
        self.placed: dict[str, str] = {}  # task id → context it was placed in
        self.mean_energy: float | None = None  # J per task, moving

    @staticmethod
    def context(task: Task, node: Node, now: float) -> str:
        """What is seen when `task` is put on `node`, in coarse steps."""
        full = min(int(4 * node.taken / node.info.slots), 6)
        left = max(0, min(int(math.log2(max(task.deadline - now, 0.1)) * 2), 12))
        prompt = max(0, min(int(math.log2(task.prompt_tokens)) - 6, 6))
        return f"{node.name}|{full}|{left}|{prompt}"

    def free_energy(self, context: str) -> float:
        """G of acting in `context`, nats."""
        counts = self.counts.get(context, PRIOR)
        total = sum(counts)
        surprise = -sum(c / total * p for c, p in zip(counts, PREFERENCE, strict=True))
        # The information a further outcome would give about its probabilities, to first order
        novelty = sum(c / total * 0.5 * (1 / c - 1 / total) for c in counts)
        return surprise - self.curiosity * novelty

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        contexts = {node.name: self.context(task, node, now) for node in candidates}
        best = min(contexts, key=lambda name: self.free_energy(contexts[name]))
        self.placed[task.id] = contexts[best]
        return Place(best)

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        match event:
            case Completed():
                energy = event.receipt.energy.total
                mean = energy if self.mean_energy is None else self.mean_energy
                self.mean_energy = mean + 0.02 * (energy - mean)
                self._learn(event.id, (CHEAP if energy <= mean else EXPENSIVE) if event.on_time else LATE)
            case Ended(state=State.EXPIRED):
                self._learn(event.id, LATE)
            case _ if event.type in ("ended", "returned"):
                self.placed.pop(event.id, None)

    def _learn(self, task_id: str, outcome: int) -> None:
        if (context := self.placed.pop(task_id, None)) is not None:
            self.counts.setdefault(context, list(PRIOR))[outcome] += 1.0

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        explained = []
        for node in candidates:
            context = self.context(task, node, now)
            counts = self.counts.get(context, PRIOR)
            on_time = 1 - counts[LATE] / sum(counts)
            g = self.free_energy(context)
            note = f"free energy {g:.2f} from {sum(counts) - sum(PRIOR):.0f} such tasks"
            explained.append(Candidate(node=node.name, index=-g, p_on_time=on_time, note=note))
        return tuple(explained)
