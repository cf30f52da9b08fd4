"""What a runner knows of its batches beside what is stored: another process begins without it, and loses nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from perllm.broker.api.batches.lines import START, Position

#: Seconds a batch works before another one does, about.
SLICE = 0.01

T = TypeVar("T")


@dataclass
class Progress:
    """Of one batch. Times are of the monotonic clock."""

    due: float = 0.0  # when to look at it next
    unsubmitted_from: Position = START  # no line before this is still to be submitted
    no_room: bool = False  # the tenant's quota had no room for all of its lines
    collected: float | None = None  # when results were last collected, or first waited to be
    failures: int = 0  # in a row, by a bug of ours


class TimeSlice:
    """The time a batch may work for now."""

    def __init__(self) -> None:
        self._end = 0.0

    def begin(self) -> None:
        """A new one, from now on."""
        self._end = time.monotonic() + SLICE

    def iterate(self, items: Iterable[T]) -> Iterator[T | None]:
        """The items, and None where the slice has ended: the caller is to yield then."""
        for item in items:
            if time.monotonic() > self._end:
                yield None
            yield item
