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
    features = np.array(
        [
            steps,
            after.sequence_steps - before.sequence_steps,
            after.prefilled - before.prefilled,
            after.context_steps - before.context_steps,
        ],
        float,
    )
    return Sample(features, seconds) if np.all(features >= 0) else None


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
    _variance: float = 0.0  # of the time of that step, s²; and by the prior
    _prior_variance: float = 0.0
    _summary: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        self.mean, self.cov = self.base.copy(), self._prior()
        self.typical_step = np.array([1.0, 2.0, 0.0, 400.0])
        self._update_summary()

    def _update_summary(self) -> None:
        """What `at_time` needs, as plain numbers: it is asked often."""
        x = self.typical_step
        self._summary = (tuple(self.base.tolist()), tuple(self.mean.tolist()), tuple(x.tolist()))
        self._variance, self._prior_variance = float(x @ self.cov @ x), float(x @ self._prior() @ x)

    @classmethod
    def calibrated(cls, calibration: StepCost, at: float) -> StepCostModel:
        """As measured at boot."""
        return cls(theta_of(calibration), at)

    def _prior(self) -> Floats:
        a, b = self.base[:2]
        # A coefficient calibrated as nothing may still turn out to be something.
        scale = np.maximum(self.base, np.array([0.05 * b, 0.02 * a, 0.01 * (a + b), 2e-5 * (a + b)]))
        cov: Floats = COMMON_SIGMA**2 * np.outer(self.base, self.base) + np.diag((SINGLE_SIGMA * scale) ** 2)
        return cov

    def relax(self, now: float) -> None:
        """Forget for the time since the last sample."""
        keep = math.exp(-max(now - self.at, 0.0) / RELAXATION)
        self.at = max(now, self.at)
        self.mean = self.base + keep * (self.mean - self.base)
        prior = self._prior()
        self.cov = prior + keep * keep * (self.cov - prior)
        self.count *= keep
        self._update_summary()

    def learn(self, sample: Sample, now: float) -> bool:
        """Take in a sample; False when it was set aside as suspect."""
        self.relax(now)
        x = sample.features
        predicted = float(x @ self.mean)
        gain = self.cov @ x
        noise = (NOISE * predicted) ** 2
        error = sample.seconds - predicted
        if abs(error) > SUSPECT_SIGMAS * math.sqrt(float(x @ gain) + noise):
            side = 1 if error > 0 else -1
            if self.suspect_side != side:
                self.suspect_side = side
                return False
            self.cov = self.cov + (error / predicted) ** 2 * np.outer(self.mean, self.mean)
            gain = self.cov @ x
        self.suspect_side = 0
        gain = gain / (float(x @ gain) + noise)
        self.mean = np.maximum(self.mean + gain * error, MIN_SHARE * self.base)
        keep = np.eye(4) - np.outer(gain, x)
        self.cov = keep @ self.cov @ keep.T + noise * np.outer(gain, gain)  # Joseph's form stays positive
        self.count += 1.0
        self.typical_step = 0.9 * self.typical_step + 0.1 * x / x[0]
        self._update_summary()
        return True

    def at_time(self, now: float) -> tuple[tuple[float, float, float, float], float, float]:
        """θ (s), σ of a typical step's time as a share of it, and the count, all relaxed to `now`; changes nothing."""
        keep = math.exp(-max(now - self.at, 0.0) / RELAXATION)
        (a0, b0, c0, d0), (a, b, c, d), (x0, x1, x2, x3) = self._summary
        a, b, c, d = a0 + keep * (a - a0), b0 + keep * (b - b0), c0 + keep * (c - c0), d0 + keep * (d - d0)
        variance = keep * keep * self._variance + (1 - keep * keep) * self._prior_variance
        step = a * x0 + b * x1 + c * x2 + d * x3
        return (a, b, c, d), math.sqrt(max(variance, 0.0)) / max(step, 1e-12), self.count * keep

    def rebase(self, calibration: StepCost, now: float) -> None:
        """The node started anew with this calibration: what was learned of the machine stays, with less confidence."""
        self.relax(now)
        self.base = theta_of(calibration)
        self.cov = (self.cov + self._prior()) / 2
        self.mean = np.maximum(self.mean, MIN_SHARE * self.base)
        self._update_summary()

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
        model._update_summary()
        return model


def theta_of(calibration: StepCost) -> Floats:
    """θ₀ of a calibration (s). All zeros, which no engine is, become a nanosecond a step."""
    base = np.array([calibration.step, calibration.sequence, calibration.prefill, calibration.context], float)
    base[0] = max(base[0], 1e-9)
    return base
