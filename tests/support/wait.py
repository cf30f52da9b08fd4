"""Waiting for something to become true: bounded, and never longer than it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Seconds after which a test gives up. Far beyond what anything here takes, so a busy machine does not fail tests.
PATIENCE = 60.0


def eventually(look: Callable[[], T | None], what: str, patience: float = PATIENCE) -> T:
    """What `look` returns, as soon as it is true. Raises AssertionError saying what never happened."""
    give_up = time.monotonic() + patience
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > give_up:
            raise AssertionError(f"after {patience:g} s still not: {what} (last seen: {seen!r})")
        time.sleep(0.02)
