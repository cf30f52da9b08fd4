"""The interface of a placement policy: CS-UCB and every baseline implement it, for service and simulator alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from perllm.broker.messages import Candidate, Event, LengthForecast, NodeBelief
from perllm.scheduler.core.cluster import Cluster, Node, Task


@dataclass(frozen=True, slots=True)
class Place:
    """Put the task on `node` now."""

    node: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Leave the task pending. Without `until` it is asked about again in every round; with it, only when room appears
    on a node that serves its model, and at `until` (s) at the latest; then those of higher `rank` first. `hopeless`: no
    candidate gives it a chance to be on time."""

    until: float | None = None
    rank: float = 0.0
    hopeless: bool = False


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the task for good."""

    reason: str


Choice = Place | Wait | Reject


class Policy(Protocol):
    """Chooses a node per task and learns from what happened.

    The first sentence of the class's docstring describes it to users (`perllm.scheduler.policies.describe_policies`).

    Deterministic: the same calls in the same order give the same choices (randomness is seeded and part of the
    snapshot). No I/O and no clock; `now` is the server's clock in s.
    """

    name: str

    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        """Choose among `candidates`: the live nodes that serve the task's model, can hold it and have room (never
        empty)."""

    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        """Learn from `event`, called before the cluster state changes by it. `task` is the task it is about, as it
        was, or None."""

    def explain(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> tuple[Candidate, ...]:
        """Each candidate's score for this task. Called right after `choose` with the same arguments; changes
        nothing."""

    def forecast_length(self, task: Task) -> LengthForecast | None:  # noqa: ARG002
        """What it believes of the task's output length, where it has such a belief. Called after `explain`."""
        return None

    def beliefs(self, cluster: Cluster, now: float) -> dict[str, NodeBelief]:  # noqa: ARG002
        """What it has learned of the live nodes, by name, for people; nothing where it learns nothing of nodes."""
        return {}

    def snapshot(self) -> dict[str, Any]:
        """The learned state as JSON-able data. After `restore` of it, decisions are identical."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state `snapshot` returned. Raises ValueError or KeyError for a foreign one."""
