"""What an engine step takes, by the four coefficients of its `StepCost`, and when one took suspiciously long."""

from __future__ import annotations

from perllm.broker.messages import StepCost

#: A step that takes so many times its expected time, and `STALL_SECONDS` more, was held up by something else.
STALL_FACTOR, STALL_SECONDS = 3.0, 0.2


def step_time(cost: StepCost, *, sequences: int, prefilled: int = 0, context: int = 0) -> float:
    """Expected seconds of a step over `sequences` that hold `context` tokens and prefills `prefilled` more."""
    return cost.step + cost.sequence * sequences + cost.prefill * prefilled + cost.context * context


def decode_work(cost: StepCost, *, sequences: int, context: int = 0) -> float:
    """One decoded token's part, s, of a step over `sequences`: what its energy is shared by. `context` is its own."""
    return cost.step / max(1, sequences) + cost.sequence + cost.context * context


def is_stall(seconds: float, expected: float) -> bool:
    """Whether a step of so many seconds was held up by something else: useless for learning how fast steps are."""
    return seconds > STALL_SECONDS + STALL_FACTOR * expected
