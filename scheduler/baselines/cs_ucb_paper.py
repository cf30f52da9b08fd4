"""CS-UCB as PerLLM published it (arXiv 2405.14636): one mean reward per service class and server.

The objective, the deadline constraint C1 and the regret bound are the paper's; the normalisers and the constraints
C2 (compute) and C3 (bandwidth) are reconstructed from its public descriptions, since no code was published. C4, one
server per task, holds by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import override

from perllm.broker.messages import Candidate, Completed, Ended, Event, Returned, State
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.calibrated_forecast import forecast
from perllm.scheduler.baselines.mean_length import MeanLength
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place
from perllm.scheduler.core.service_classes import Classes

#: Least time to a deadline used as a divisor, s.
_MIN_TIME = 1e-3


@dataclass(slots=True)
class Arm:
    """What was learned of one (service class, server): feedbacks seen, their mean reward and mean delay (s)."""

    count: int = 0
    reward: float = 0.0
    delay: float = 0.0

    def update(self, reward: float, delay: float) -> None:
        self.count += 1
        self.reward += (reward - self.reward) / self.count
        self.delay += (delay - self.delay) / self.count


@dataclass(frozen=True, slots=True)
class Estimate:
    """One server for one task: predicted delay (s), normalised slacks, bonus and index."""

    node: str
    delay: float
    slacks: dict[str, float]
    bonus: float
    index: float

    @property
    def f(self) -> float:
        """Constraint satisfaction: the smallest slack; feasible when not negative."""
        return min(self.slacks.values())


class CsUcbPaper(Baseline):
    """CS-UCB as published: one mean reward per service class and server (PerLLM, arXiv 2405.14636).

    argmax of R̄ + δ·sqrt(ln t / L) + θ·P over the feasible servers, over all when none is; untried ones first.

    `delta`, `lam`, `theta` are the paper's δ, λ, θ; `weights` its ω for transfer, inference and idle energy.
    `queue_room` is how many tasks beyond its slots a node's compute budget C_max counts.
    """

    name = "cs-ucb-paper"

    def __init__(
        self,
        seed: int = 0,
        *,
        delta: float = 0.5,
        lam: float = 1.0,
        theta: float = 1.0,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        queue_room: int = 2,
    ) -> None:
        super().__init__(seed)
        self.delta, self.lam, self.theta, self.weights, self.queue_room = delta, lam, theta, weights, queue_room
        self.arms: Classes[dict[str, Arm]] = Classes(dict)  # of each class, by node
        self.feedbacks = 0  # t
        self.energy_norm = 0.0  # J, the largest energy seen so far (reconstructed: the paper names no normaliser)
        self.lengths = MeanLength()
        self.placed: dict[str, float] = {}  # task id → the smaller of its compute and bandwidth slacks when placed

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        best = self._best([self._estimate(task, node, now) for node in candidates])
        self.placed[task.id] = min(best.slacks["compute"], best.slacks["bandwidth"])
        return Place(best.node)

    @staticmethod
    def _best(estimates: list[Estimate]) -> Estimate:
        return max([e for e in estimates if e.f >= 0] or estimates, key=lambda e: e.index)

    def _estimate(self, task: Task, node: Node, now: float) -> Estimate:
        arm = self.arms.get(task.tenant, task.service).get(node.name)
        delay = arm.delay if arm is not None else forecast(node, task, self.lengths).finish
        slacks = self._slacks(task, node, delay, now)
        f = min(slacks.values())
        if arm is None:
            return Estimate(node.name, delay, slacks, math.inf, math.inf)
        bonus = self.delta * math.sqrt(math.log(self.feedbacks) / arm.count)
        penalty = min(f, 0.0)
        return Estimate(node.name, delay, slacks, bonus, arm.reward + bonus + self.theta * penalty)

    def _slacks(self, task: Task, node: Node, delay: float, now: float) -> dict[str, float]:
        """The normalised slacks of C1 to C3, work in flight and this task included."""
        allowed = max(task.deadline - now, _MIN_TIME)
        capacity = node.info.slots + self.queue_room
        needed = task.payload_bytes / allowed
        for flight in node.in_flight.values():
            if flight.claimed is None:
                needed += flight.payload_bytes / max(flight.deadline - now, _MIN_TIME)
        return {
            "deadline": (allowed - delay) / allowed,
            "compute": (capacity - node.taken - 1) / capacity,
            "bandwidth": (node.info.bandwidth - needed) / node.info.bandwidth,
        }

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self.lengths.observe(event, task)
        if isinstance(event, Completed | Ended | Returned):
            room = self.placed.pop(event.id, None)
            if isinstance(event, Completed) and task is not None and task.dispatched is not None:
                self._learn(event, task, 1.0 if room is None else room, event.at - task.dispatched)

    def _learn(self, event: Completed, task: Task, room: float, delay: float) -> None:
        """R = −Σ ω·E / E_norm + λ·f, with the delay that was measured in f's deadline slack.

        The paper lets late tasks run on. Of one that was cut at its deadline the delay is not known; it counts as twice
        the deadline (slack −1), since taking the cut for the end would praise the node that was too slow.
        """
        allowed = max(task.deadline - event.at + delay, _MIN_TIME)
        if event.state is State.EXPIRED:
            delay = 2 * allowed
        f = min((allowed - delay) / allowed, room)
        energy = event.receipt.energy
        joules = sum(w * e for w, e in zip(self.weights, (energy.transfer, energy.inference, energy.idle), strict=True))
        self.energy_norm = max(self.energy_norm, joules)
        reward = self.lam * f - (joules / self.energy_norm if self.energy_norm > 0 else 0.0)
        self.feedbacks += 1
        self.arms.get(task.tenant, task.service).setdefault(event.node, Arm()).update(reward, delay)

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        estimates = [self._estimate(task, node, now) for node in candidates]
        return tuple(
            Candidate(
                node=e.node,
                index=None if math.isinf(e.index) else e.index,
                feasible=e.f >= 0,
                finish=e.delay,
                slacks=e.slacks,
                confidence=None if math.isinf(e.bonus) else e.bonus,
                note=self._note(e, task, now),
            )
            for e in estimates
        )

    @staticmethod
    def _note(e: Estimate, task: Task, now: float) -> str:
        if math.isinf(e.index):
            return f"untried for class {task.service!r}, forecast {e.delay:.2f} s of {task.deadline - now:.2f} s"
        if e.f >= 0:
            return f"expected {e.delay:.2f} s of {task.deadline - now:.2f} s, index {e.index:.2f}"
        short = min(e.slacks, key=lambda name: e.slacks[name])
        return f"short of {short} (slack {e.f:.2f}), index {e.index:.2f}"

    @override
    def snapshot(self) -> dict[str, Any]:
        return {
            **super().snapshot(),
            "arms": [
                [tenant, service, {node: asdict(arm) for node, arm in arms.items()}]
                for tenant, service, arms in self.arms
            ],
            "feedbacks": self.feedbacks,
            "energy_norm": self.energy_norm,
            "lengths": self.lengths.snapshot(),
            "placed": dict(self.placed),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        arms: Classes[dict[str, Arm]] = Classes(dict)
        for tenant, service, known in state["arms"]:
            arms.put(tenant, service, {node: Arm(**arm) for node, arm in known.items()})
        feedbacks, energy_norm = int(state["feedbacks"]), float(state["energy_norm"])
        lengths, placed = MeanLength.restored(state["lengths"]), dict(state["placed"])
        super().restore(state)
        self.arms, self.feedbacks, self.energy_norm, self.lengths, self.placed = (
            arms,
            feedbacks,
            energy_norm,
            lengths,
            placed,
        )
