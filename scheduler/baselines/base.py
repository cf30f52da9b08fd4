"""What all baselines share: a seeded generator, an explanation, a snapshot of plain fields."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from typing_extensions import override

from perllm.broker.messages import Candidate, Event
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Policy


class Baseline(Policy):
    """A policy that learns nothing. Subclasses give `choose`, and `observe` where they learn.

    `state_fields` names the attributes that hold what was learned; they must be JSON-able and make up the snapshot
    together with the random generator.
    """

    name = "baseline"
    state_fields: tuple[str, ...] = ()

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        raise NotImplementedError

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        """Learn nothing."""

    @override
    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        """How many tasks each candidate holds: all that most of these policies look at."""
        return tuple(Candidate(node=n.name, note=f"holds {n.taken} of {n.info.slots} slots") for n in candidates)

    @override
    def snapshot(self) -> dict[str, Any]:
        state = {field: getattr(self, field) for field in self.state_fields}
        return {"rng": self.rng.bit_generator.state, **deepcopy(state)}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        learned = deepcopy({field: state[field] for field in self.state_fields})  # all there, before anything changes
        self.rng.bit_generator.state = state["rng"]
        for field, value in learned.items():
            setattr(self, field, value)
