"""The result of a simulation: how each task ended, and the figures of the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from perllm.broker.messages import State


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one task ended. Times s, energy J (idle power apart)."""

    submitted: float
    deadline: float
    ended: float
    state: State
    on_time: bool
    value: float
    node: str | None
    tokens: int
    joules: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One policy at one load with one seed. Rates are over the time in which tasks arrived."""

    policy: str
    load: float
    seed: int
    tasks: int
    on_time: float  # share of all tasks
    on_time_value: float  # share of all value
    goodput: float  # on-time tasks/s
    tokens_s: float  # tokens/s, all that were generated
    joules: float  # J per on-time task, idle power apart
    joules_idle: float  # J of idle power per on-time task
    latency_p50: float  # s, of tasks that ran to their end
    latency_p95: float
    rejected: int
    expired: int
    late: int
    failed: int
    wall: float  # s the simulation took
    outcomes: tuple[Outcome, ...] = field(repr=False)  # in order of arrival

    def figures(self) -> dict[str, Any]:
        """Everything but the single outcomes, as JSON-able data."""
        data = asdict(self)
        del data["outcomes"]
        return data


#: A load is carried while this share of the tasks is on time.
ON_TIME_TARGET = 0.8


def effective_capacity(points: Iterable[tuple[float, float]], least: float = ON_TIME_TARGET) -> float:
    """The highest load with at least `least` of the tasks on time, from (load, on-time share) points: linear between
    the last point that holds and the next. Below the first load it is scaled from 0; beyond the last it is the last."""
    before = (0.0, 1.0)
    best = 0.0
    for load, share in sorted(points):
        if share >= least:
            best = load
        elif before[1] >= least:
            best = before[0] + (load - before[0]) * (before[1] - least) / (before[1] - share)
        before = (load, share)
    return best


def mean(runs: Sequence[RunResult], figure: str) -> float:
    """The mean of a figure over runs (seeds)."""
    return float(np.mean([getattr(r, figure) for r in runs]))
