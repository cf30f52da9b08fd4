"""Textbook bandits over nodes: UCB1, Thompson sampling, LinUCB. The reward is 1 for a task on time, else 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from perllm.broker.messages import Completed, Ended, Event, State
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.forecast import MeanLength
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place

Floats = NDArray[np.float64]


def reward(event: Event) -> tuple[str, float] | None:
    """The node and the reward an event reports; None for other events."""
    match event:
        case Completed():
            return event.node, float(event.on_time)
        case Ended(state=State.EXPIRED, node=str(node)):
            return node, 0.0
        case _:
            return None


class Ucb1(Baseline):
    """UCB1 (Auer et al. 2002): mean reward + sqrt(2 ln t / n), untried nodes first. `arms[node]` is [n, Σ reward]."""

    name = "ucb1"
    state_fields = ("arms",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.arms: dict[str, list[float]] = {}

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        total = sum(n for n, _ in self.arms.values())

        def index(node: Node) -> float:
            n, rewards = self.arms.get(node.name, (0.0, 0.0))
            return math.inf if n == 0 else rewards / n + math.sqrt(2 * math.log(total) / n)

        return Place(max(candidates, key=index).name)

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        if (outcome := reward(event)) is not None:
            arm = self.arms.setdefault(outcome[0], [0.0, 0.0])
            arm[0] += 1
            arm[1] += outcome[1]


class Thompson(Baseline):
    """Thompson sampling on Beta posteriors from a uniform prior. `arms[node]` is [n, Σ reward]."""

    name = "thompson"
    state_fields = ("arms",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.arms: dict[str, list[float]] = {}

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        pairs = [self.arms.get(node.name, (0.0, 0.0)) for node in candidates]
        drawn = [self.rng.beta(1 + rewards, 1 + n - rewards) for n, rewards in pairs]
        return Place(candidates[int(np.argmax(drawn))].name)

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        if (outcome := reward(event)) is not None:
            arm = self.arms.setdefault(outcome[0], [0.0, 0.0])
            arm[0] += 1
            arm[1] += outcome[1]


class LinUcb(Baseline):
    """LinUCB with one model per node (Li et al. 2010, algorithm 1): x·θ + alpha·sqrt(xᵀA⁻¹x), A = I + Σ xxᵀ.

    x sees the queue: [1, tasks per slot, the same beyond the slots, prompt, expected output, time left], scaled to
    about 1.
    """

    name = "linucb"
    features = 6

    def __init__(self, seed: int = 0, *, alpha: float = 0.5) -> None:
        super().__init__(seed)
        self.alpha = alpha
        self.lengths = MeanLength()
        self.inverse: dict[str, Floats] = {}  # node → A⁻¹, (features, features)
        self.sums: dict[str, Floats] = {}  # node → Σ reward·x, (features,)
        self.placed: dict[str, list[float]] = {}  # task id → x when it was placed

    def x(self, task: Task, node: Node, now: float) -> list[float]:
        """The features of `task` on `node`."""
        held = len(node.in_flight) / node.info.slots
        length = self.lengths.tokens(task)
        left = task.deadline - now
        return [1.0, min(held, 1.0), max(held - 1.0, 0.0), task.prompt_tokens / 500, length / 100, min(left / 5, 4.0)]

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        best, top, chosen = candidates[0], -math.inf, [0.0]
        for node in candidates:
            x = self.x(task, node, now)
            index = self.index(node.name, np.array(x))
            if index > top:
                best, top, chosen = node, index, x
        self.placed[task.id] = chosen
        return Place(best.name)

    def index(self, node: str, x: Floats) -> float:
        """The upper confidence bound of the reward of features `x` (features,) on `node`."""
        inverse = self.inverse.get(node)
        if inverse is None:
            return self.alpha * math.sqrt(float(x @ x))
        return float(x @ inverse @ self.sums[node] + self.alpha * math.sqrt(max(float(x @ inverse @ x), 0.0)))

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        self.lengths.observe(event, task)
        if event.type not in ("completed", "ended", "returned"):
            return
        x = self.placed.pop(event.id, None)
        outcome = reward(event)
        if x is not None and outcome is not None:
            self.update(outcome[0], np.array(x), outcome[1])

    def update(self, node: str, x: Floats, y: float) -> None:
        """Learn that features `x` on `node` were rewarded with `y` (Sherman-Morrison)."""
        inverse = self.inverse.setdefault(node, np.eye(self.features))
        ax = inverse @ x
        inverse -= np.outer(ax, ax) / (1.0 + float(x @ ax))
        self.sums.setdefault(node, np.zeros(self.features))
        self.sums[node] += y * x

    @override
    def snapshot(self) -> dict[str, Any]:
        return {
            **super().snapshot(),
            "lengths": self.lengths.snapshot(),
            "inverse": {node: a.tolist() for node, a in self.inverse.items()},
            "sums": {node: b.tolist() for node, b in self.sums.items()},
            "placed": deepcopy(self.placed),
        }

    @override
    def restore(self, state: dict[str, Any]) -> None:
        lengths, placed = MeanLength.restored(state["lengths"]), deepcopy(state["placed"])
        inverse = {node: np.array(a) for node, a in state["inverse"].items()}
        sums = {node: np.array(b) for node, b in state["sums"].items()}
        super().restore(state)
        self.lengths, self.placed, self.inverse, self.sums = lengths, placed, inverse, sums
