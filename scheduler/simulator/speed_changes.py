"""How the speed of nodes and links changes with time, apart from load: noise, drift and faults.

All are piecewise constant functions of time, so that everything between two changes has a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perllm.scheduler.simulator.scenario import Fault, Link, Loss, Narrow, NodeSpec, Rotate, Slow, Stalls

#: How often a node's noise is drawn anew, s.
NOISE_EVERY = 0.5


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Between `start` and `end` (s) everything takes `factor` times as long; an infinite factor is a stall."""

    start: float
    end: float
    factor: float


class PiecewiseConstant:
    """A function of time that is constant within each interval of `every` s and between the ends of `slowdowns`, which
    multiply it. This one is 1 apart from them; subclasses draw the intervals' values."""

    def __init__(self, every: float, slowdowns: Sequence[Slowdown], begin: float) -> None:
        self.every = every
        self.begin = begin
        self.slowdowns = sorted(slowdowns, key=lambda s: s.start)
        self._values: list[float] = []

    def _more(self) -> list[float]:
        """Values of the next intervals."""
        return [1.0] * 256

    def at(self, time: float) -> tuple[float, float]:
        """The value at `time`, and until when it holds (later than `time`)."""
        index = int((time - self.begin) / self.every)
        until = self.begin + (index + 1) * self.every
        if until <= time:  # the division rounded down onto the boundary
            index, until = index + 1, until + self.every
        while index >= len(self._values):
            self._values += self._more()
        value = self._values[index]
        for slowdown in self.slowdowns:
            if slowdown.start > time:
                until = min(until, slowdown.start)
                break
            if time < slowdown.end:
                value *= slowdown.factor
                until = slowdown.end if math.isinf(value) else min(until, slowdown.end)
        return value, until


class StepTimeFactor(PiecewiseConstant):
    """A node's step times over its table's: independent lognormal noise, a slow Ornstein-Uhlenbeck drift of the
    logarithm, faults."""

    def __init__(self, spec: NodeSpec, slowdowns: Sequence[Slowdown], begin: float, rng: np.random.Generator) -> None:
        super().__init__(NOISE_EVERY, slowdowns, begin)
        self._spec, self._rng = spec, rng
        self._drift = spec.drift * rng.standard_normal()
        self._drifts: list[float] = []

    def without_noise(self, time: float) -> tuple[float, float]:
        """The s for which the node stands still from `time` on, and the factor after that, its noise left out."""
        after = time
        while math.isinf(self.at(after)[0]):
            after = self.at(after)[1]
        factor = math.exp(self._drifts[int((after - self.begin) / self.every)])
        for slowdown in self.slowdowns:
            if slowdown.start <= after < slowdown.end:
                factor *= slowdown.factor
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


class SecondsPerByte(PiecewiseConstant):
    """A link's seconds per byte: its bandwidth is uniform within its fluctuation in each interval."""

    def __init__(self, link: Link, slowdowns: Sequence[Slowdown], begin: float, rng: np.random.Generator) -> None:
        super().__init__(link.every, slowdowns, begin)
        self._link, self._rng = link, rng

    def _more(self) -> list[float]:
        link = self._link
        bandwidth = link.bandwidth * (1.0 + self._rng.uniform(-link.fluctuation, link.fluctuation, 256))
        return [float(1.0 / b) for b in bandwidth]


def node_slowdowns(name: str, faults: Sequence[Fault], begin: float, rng: np.random.Generator) -> list[Slowdown]:
    """What the faults do to the node's step times."""
    slowdowns = []
    for fault in faults:
        if name not in fault.nodes:
            continue
        start, end = begin + fault.start, begin + fault.end
        match fault:
            case Slow():
                slowdowns.append(Slowdown(start, end, fault.factor))
            case Rotate():
                turn = start + fault.every * fault.nodes.index(name)
                while turn < end:
                    slowdowns.append(Slowdown(turn, min(turn + fault.every, end), fault.factor))
                    turn += fault.every * len(fault.nodes)
            case Stalls():
                at = start + rng.exponential(fault.every)
                while at < end:
                    slowdowns.append(Slowdown(at, at + fault.lasting, math.inf))
                    at += fault.lasting + rng.exponential(fault.every)
            case Narrow() | Loss():
                pass
    return slowdowns


def link_slowdowns(name: str, faults: Sequence[Fault], begin: float) -> list[Slowdown]:
    """What the faults do to the link's seconds per byte."""
    return [
        Slowdown(begin + f.start, begin + f.end, 1.0 / f.factor)
        for f in faults
        if isinstance(f, Narrow) and name in f.nodes
    ]
