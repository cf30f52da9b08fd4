"""Pauses between tries."""

from __future__ import annotations

import random


def backoff(tries: int, *, first: float, longest: float) -> float:
    """Seconds to wait after so many failed tries: doubling from `first` up to `longest`, jittered by half."""
    return min(longest, first * 2.0 ** (tries - 1)) * random.uniform(0.5, 1.5)
