"""The step cost of a batching engine, fitted to the steps timed at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from perllm.broker.messages import StepCost


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One engine step: what was in it and how long it took."""

    seconds: float
    sequences: int  # in the batch
    prefilled: int  # prompt tokens
    context: int  # tokens held by all of them

    @property
    def features(self) -> tuple[float, float, float, float]:
        return (1.0, self.sequences, self.prefilled, self.context)


def fit_step_cost(steps: Sequence[TimedStep]) -> StepCost:
    """The step cost with the least relative errors on `steps` (one at least), no coefficient negative.

    Four unknowns, so the best of the 15 least-squares fits on a subset of them that has no negative coefficient is the
    non-negative least-squares fit.
    """
    seconds = np.array([step.seconds for step in steps])
    features = np.array([step.features for step in steps]) / seconds[:, None]
    scale = np.maximum(np.abs(features).max(axis=0), 1e-30)  # else steps of 1 and contexts of 100,000 do not mix
    best, least = np.zeros(4), float(len(steps))
    for size in range(1, 5):
        for chosen in combinations(range(4), size):
            columns = list(chosen)
            solved, *_ = np.linalg.lstsq(features[:, columns] / scale[columns], np.ones(len(steps)), rcond=None)
            error = float(((features[:, columns] / scale[columns] @ solved - 1) ** 2).sum())
            if np.all(solved >= 0) and error < least - 1e-12:
                best, least = np.zeros(4), error
                best[columns] = solved / scale[columns]
    step, sequence, prefill, context = best.tolist()
    return StepCost(step=step, sequence=sequence, prefill=prefill, context=context)


def energy_weights(cost: StepCost) -> str:
    """What a token weighs when energy is shared out, for receipts."""
    decode = f"{1e3 * cost.step:.3g}/batch + {1e3 * cost.sequence:.3g} + {1e3 * cost.context:.2g}/context token"
    return f"ms per token: prefill {1e3 * cost.prefill:.3g}, decode {decode}"
