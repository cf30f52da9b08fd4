"""What a step of an engine costs: a Kalman filter over the linear step cost (docs/architecture.md, "The forecast").

A step costs about a + b·(active sequences) + c·(tokens prefilled) + d·(context tokens held) seconds. θ = (a, b, c, d)
is learned from the differences of the engine's running totals, which give the time and the features of the very same
steps. Between samples θ forgets: it relaxes to the boot-time calibration θ₀ with time constant `RELAXATION` and its
covariance to the prior's, which is mostly common-mode (all four scale together, as a slowdown makes them). That is an
Ornstein-Uhlenbeck process, so what no sample excites stays bounded however collinear the features are, where
exponential forgetting would let it grow without limit.

A sample more than 3σ off is dropped as a stall or a glitch; a second one on the same side is a change, and widens the
covariance until the filter can follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perllm.broker.messages import Counters, StepCost, StepTotals
from perllm.scheduler.core.compiled import compiled

Floats = NDArray[np.float64]

#: Time constant of the relaxation to the calibration, s.
RELAXATION = 60.0
#: σ of a sample, as a share of its predicted time.
NOISE = 0.1
#: Prior σ of θ around the calibration, as a share: of all four together, of each alone.
COMMON_SIGMA, SINGLE_SIGMA = 0.35, 0.25
#: A sample off by more σ than this is suspect.
SUSPECT_SIGMAS = 3.0
#: No coefficient falls below this share of its calibration.
MIN_SHARE = 1e-3
#: A sample spans at least so many steps, or so many seconds of them.
MIN_STEPS, MIN_BUSY = 4, 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """What some steps of an engine took: `features` are (steps, Σ active, tokens prefilled, Σ context tokens)."""

    features: Floats
    seconds: float


def sample_between(before: Counters | StepTotals, after: Counters | StepTotals) -> Sample | None:
    """The steps between two readings of one engine, or of one of its models, or None when they are too few to tell."""
    steps, seconds = after.steps - before.steps, after.busy - before.busy
    if steps < 1 or seconds <= 0 or (steps < MIN_STEPS and seconds < MIN_BUSY):
        return None
    sequences, prefilled = after.sequence_steps - before.sequence_steps, after.prefilled - before.prefilled
    context = after.context_steps - before.context_steps
    if min(sequences, prefilled, context) < 0:
        return None
    return Sample(np.array((steps, sequences, prefilled, context), float), seconds)


def stalled(now: Counters, longest: float) -> bool:
    """Whether an engine with work has stood still for longer than its longest step explains (p = 0 until it moves)."""
    return now.since_progress > 3 * longest + 0.2


@dataclass(slots=True)
class StepCostModel:
    """θ of one model on one node: `mean` (4,) in s, `cov` (4, 4), as of time `at` (s)."""

    base: Floats  # θ₀, the calibration
    at: float
    mean: Floats = field(init=False)
    cov: Floats = field(init=False)
    count: float = 0.0  # samples, fading as they age
    suspect_side: int = 0  # ±1 after a suspect sample, by its side
    typical_step: Floats = field(init=False)  # features of a mean step
    _prior: Floats = field(init=False)  # covariance (4, 4) of θ₀

    def __post_init__(self) -> None:
        self._prior = _prior_of(self.base)
        self.mean, self.cov = self.base.copy(), self._prior.copy()
        self.typical_step = np.array([1.0, 2.0, 0.0, 400.0])

    @classmethod
    def calibrated(cls, calibration: StepCost, at: float) -> StepCostModel:
        """As measured at boot."""
        return cls(theta_of(calibration), at)

    def relax(self, now: float) -> None:
        """Forget for the time since the last sample."""
        keep = math.exp(-max(now - self.at, 0.0) / RELAXATION)
        self.at = max(now, self.at)
        self.count *= keep
        _relax(self.mean, self.cov, self.base, self._prior, keep)

    def learn(self, sample: Sample, now: float) -> bool:
        """Take in a sample; False when it was set aside as suspect."""
        self.relax(now)
        side = _take_in(self.mean, self.cov, self.base, sample.features, sample.seconds, self.suspect_side)
        self.suspect_side = side
        if side:
            return False
        self.count += 1.0
        self.typical_step = 0.9 * self.typical_step + 0.1 * sample.features / sample.features[0]
        return True

    def at_time(self, now: float) -> tuple[tuple[float, float, float, float], float, float]:
        """θ (s), σ of a typical step's time as a share of it, and the count, all relaxed to `now`; changes nothing."""
        keep = math.exp(-max(now - self.at, 0.0) / RELAXATION)
        a, b, c, d, spread = _at_time(self.mean, self.cov, self.base, self._prior, self.typical_step, keep)
        return (a, b, c, d), spread, self.count * keep

    def rebase(self, calibration: StepCost, now: float) -> None:
        """The node started anew with this calibration: what was learned of the machine stays, with less confidence."""
        self.relax(now)
        self.base = theta_of(calibration)
        self._prior = _prior_of(self.base)
        self.cov = (self.cov + self._prior) / 2
        self.mean = np.maximum(self.mean, MIN_SHARE * self.base)

    def snapshot(self) -> dict[str, Any]:
        return {
            "base": self.base.tolist(),
            "at": self.at,
            "mean": self.mean.tolist(),
            "cov": self.cov.tolist(),
            "count": self.count,
            "suspect_side": self.suspect_side,
            "typical_step": self.typical_step.tolist(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> StepCostModel:
        model = cls(np.array(state["base"], float), float(state["at"]))
        model.mean, model.cov = np.array(state["mean"], float), np.array(state["cov"], float)
        model.typical_step = np.array(state["typical_step"], float)
        model.count, model.suspect_side = float(state["count"]), int(state["suspect_side"])
        return model


def theta_of(calibration: StepCost) -> Floats:
    """θ₀ of a calibration (s). All zeros, which no engine is, become a nanosecond a step."""
    base = np.array([calibration.step, calibration.sequence, calibration.prefill, calibration.context], float)
    base[0] = max(base[0], 1e-9)
    return base


def _prior_of(base: Floats) -> Floats:
    a, b = base[:2]
    # A coefficient calibrated as nothing may still turn out to be something.
    scale = np.maximum(base, np.array([0.05 * b, 0.02 * a, 0.01 * (a + b), 2e-5 * (a + b)]))
    cov: Floats = COMMON_SIGMA**2 * np.outer(base, base) + np.diag((SINGLE_SIGMA * scale) ** 2)
    return cov


@compiled
def _relax(mean: Floats, cov: Floats, base: Floats, prior: Floats, keep: float) -> None:
    """Keep so much of what was learned."""
    for i in range(4):
        mean[i] = base[i] + keep * (mean[i] - base[i])
        for j in range(4):
            cov[i, j] = prior[i, j] + keep * keep * (cov[i, j] - prior[i, j])


@compiled
def _take_in(mean: Floats, cov: Floats, base: Floats, x: Floats, seconds: float, side: int) -> int:
    """One step of the filter: `x` took `seconds`. Returns 0, or the side of a sample that is set aside; `side` is that
    of the one set aside before it."""
    predicted, gain = _dot(x, mean), np.empty(4)
    noise, error = (NOISE * predicted) ** 2, seconds - predicted
    variance = _times(cov, x, gain) + noise
    if abs(error) > SUSPECT_SIGMAS * math.sqrt(variance):
        its = 1 if error > 0 else -1
        if side != its:
            return its
        for i in range(4):
            for j in range(4):
                cov[i, j] += (error / predicted) ** 2 * mean[i] * mean[j]
        variance = _times(cov, x, gain) + noise
    # (I − g xᵀ) cov (I − x gᵀ) + noise g gᵀ: Joseph's form stays positive
    for i in range(4):
        for j in range(4):
            cov[i, j] -= gain[i] / variance * gain[j]
    rest = np.empty(4)
    _times(cov, x, rest)
    for i in range(4):
        mean[i] = max(mean[i] + gain[i] / variance * error, MIN_SHARE * base[i])
        for j in range(4):
            cov[i, j] += (noise * gain[i] / variance - rest[i]) * gain[j] / variance
    return 0


@compiled
def _at_time(
    mean: Floats, cov: Floats, base: Floats, prior: Floats, typical: Floats, keep: float
) -> tuple[float, float, float, float, float]:
    """θ of which so much is kept, and σ of a typical step's time as a share of it."""
    step, variance = 0.0, 0.0
    theta = np.empty(4)
    for i in range(4):
        theta[i] = base[i] + keep * (mean[i] - base[i])
        step += theta[i] * typical[i]
        for j in range(4):
            variance += typical[i] * typical[j] * (prior[i, j] + keep * keep * (cov[i, j] - prior[i, j]))
    spread = math.sqrt(max(variance, 0.0)) / max(step, 1e-12)
    return theta[0], theta[1], theta[2], theta[3], spread


@compiled
def _times(matrix: Floats, x: Floats, product: Floats) -> float:
    """Fill `product` with matrix·x; returns xᵀ·matrix·x."""
    for i in range(4):
        product[i] = _dot(matrix[i], x)
    return _dot(x, product)


@compiled
def _dot(x: Floats, y: Floats) -> float:
    return float(x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3])
