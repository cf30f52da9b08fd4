"""How the world's speed changes with time, apart from load: noise, drift and faults, constant between moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perllm.scheduler.simulator.scenario import Fault, Link, Loss, Narrow, NodeSpec, Rotate, Slow, Stalls

#: How often a node's noise is drawn anew, s.
NOISE_EVERY = 0.5


@dataclass(frozen=True, slots=True)
class Change:
    """Between `start` and `end` (s) times are `factor` as long; an infinite factor is a stall."""

    start: float
    end: float
    factor: float


class Pace:
    """A factor on times that is constant within each interval of `every` s and between the ends of `changes`."""

    def __init__(self, every: float, changes: Sequence[Change], begin: float) -> None:
        self.every = every
        self.begin = begin
        self.changes = sorted(changes, key=lambda c: c.start)
        self._factors: list[float] = []

    def _more(self) -> list[float]:
        """Factors of the next intervals."""
        return [1.0] * 256

    def at(self, time: float) -> tuple[float, float]:
        """The factor at `time`, and until when it holds (later than `time`)."""
        index = int((time - self.begin) / self.every)
        until = self.begin + (index + 1) * self.every
        if until <= time:  # the division rounded down onto the boundary
            index, until = index + 1, until + self.every
        while index >= len(self._factors):
            self._factors += self._more()
        factor = self._factors[index]
        for change in self.changes:
            if change.start > time:
                until = min(until, change.start)
                break
            if time < change.end:
                factor *= change.factor
                until = change.end if math.isinf(factor) else min(until, change.end)
        return factor, until


class SpeedPace(Pace):
    """A node's step times: independent lognormal noise, a slow Ornstein-Uhlenbeck drift of the logarithm, faults."""

    def __init__(self, spec: NodeSpec, changes: Sequence[Change], begin: float, rng: np.random.Generator) -> None:
        super().__init__(NOISE_EVERY, changes, begin)
        self._spec, self._rng = spec, rng
        self._drift = spec.drift * rng.standard_normal()
        self._drifts: list[float] = []

    def trend(self, time: float) -> tuple[float, float]:
        """The truth without its noise: s for which the node stands still from `time` on, and the factor after that."""
        after = time
        while math.isinf(self.at(after)[0]):
            after = self.at(after)[1]
        factor = math.exp(self._drifts[int((after - self.begin) / self.every)])
        for change in self.changes:
            if change.start <= after < change.end:
                factor *= change.factor
        return after - time, factor

    def _more(self) -> list[float]:
        spec, size = self._spec, 256
        keep = math.exp(-NOISE_EVERY / spec.drift_time)
        noise = spec.noise * self._rng.standard_normal(size)
        pushes = spec.drift * math.sqrt(1 - keep * keep) * self._rng.standard_normal(size)
        factors = []
        for i in range(size):
            self._drift = keep * self._drift + pushes[i]
            self._drifts.append(self._drift)
            factors.append(math.exp(noise[i] + self._drift))
        return factors


class BandwidthPace(Pace):
    """A link's seconds per byte: its bandwidth is uniform within its fluctuation in each interval."""

    def __init__(self, link: Link, changes: Sequence[Change], begin: float, rng: np.random.Generator) -> None:
        super().__init__(link.every, changes, begin)
        self._link, self._rng = link, rng

    def _more(self) -> list[float]:
        link = self._link
        bandwidth = link.bandwidth * (1.0 + self._rng.uniform(-link.fluctuation, link.fluctuation, 256))
        return [float(1.0 / b) for b in bandwidth]


def speed_changes(name: str, faults: Sequence[Fault], begin: float, rng: np.random.Generator) -> list[Change]:
    """What the faults do to the node's step times."""
    changes = []
    for fault in faults:
        if name not in fault.nodes:
            continue
        start, end = begin + fault.start, begin + fault.end
        match fault:
            case Slow():
                changes.append(Change(start, end, fault.factor))
            case Rotate():
                turn = start + fault.every * fault.nodes.index(name)
                while turn < end:
                    changes.append(Change(turn, min(turn + fault.every, end), fault.factor))
                    turn += fault.every * len(fault.nodes)
            case Stalls():
                at = start + rng.exponential(fault.every)
                while at < end:
                    changes.append(Change(at, at + fault.lasting, math.inf))
                    at += fault.lasting + rng.exponential(fault.every)
            case Narrow() | Loss():
                pass
    return changes


def link_changes(name: str, faults: Sequence[Fault], begin: float) -> list[Change]:
    """What the faults do to the link's seconds per byte."""
    return [
        Change(begin + f.start, begin + f.end, 1.0 / f.factor)
        for f in faults
        if isinstance(f, Narrow) and name in f.nodes
    ]
