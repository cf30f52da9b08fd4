"""How fast a batching engine steps: fitted to timed steps at boot, then used to weigh energy and urgency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from perllm.broker.messages import MAX_DEADLINE, StepCost


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: what was in it and how long it took."""

    seconds: float
    sequences: int  # in the batch
    prefilled: int  # prompt tokens
    context: int  # tokens held by all of them

    @property
    def features(self) -> tuple[float, float, float, float]:
        return (1.0, self.sequences, self.prefilled, self.context)


def fit(steps: Sequence[Step]) -> StepCost:
    """The speed model (DESIGN section 5) with the least relative errors on `steps` (one at least), none of it negative.

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


def expected(speed: StepCost, *, sequences: int, prefilled: int = 0, context: int = 0) -> float:
    """Seconds a step takes."""
    return speed.step + speed.sequence * sequences + speed.prefill * prefilled + speed.context * context


def decode_work(speed: StepCost, *, sequences: int, context: int) -> float:
    """One decoded token's part of a step of `sequences`, s: what its energy is shared by."""
    return speed.step / max(1, sequences) + speed.sequence + speed.context * context


def weights(speed: StepCost) -> str:
    """The weights of a token in the sharing of energy, for receipts."""
    decode = f"{1e3 * speed.step:.3g}/batch + {1e3 * speed.sequence:.3g} + {1e3 * speed.context:.2g}/context token"
    return f"ms per token: prefill {1e3 * speed.prefill:.3g}, decode {decode}"


def urgency(now: float, remaining: float | None, value: float, work: float) -> int:
    """vLLM's priority (least first) of a task that came at `now` (s, monotonic) with `remaining` s to its deadline,
    needs about `work` s of decoding, and has a value.

    The latest moment to begin, in ms; the slack until then counts for less the more the task is worth. Without a
    deadline it is that of the longest accepted one.
    """
    slack = (MAX_DEADLINE if remaining is None else remaining) - work
    return int(1e3 * (now + max(0.0, slack) / value))
