"""LinUCB over nodes: the expected reward is linear in what is seen of the task and of the node's queue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from perllm.broker.messages import Event
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.baselines.mean_length import MeanLength
from perllm.scheduler.baselines.on_time_reward import on_time_reward
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place

Floats = NDArray[np.float64]


class LinUcb(Baseline):
    """LinUCB, one linear model per node of the chance to be on time (Li et al. 2010, algorithm 1).

    The index is x·θ + alpha·sqrt(xᵀA⁻¹x), A = I + Σ xxᵀ. x sees the queue: [1, tasks per slot, the same beyond the
    slots, prompt, expected output, time left], scaled to about 1.
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
        held = node.taken / node.info.slots
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
        rewarded = on_time_reward(event)
        if x is not None and rewarded is not None:
            self.update(rewarded[0], np.array(x), rewarded[1])

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
