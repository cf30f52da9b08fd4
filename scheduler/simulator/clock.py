"""The event loop: callbacks in order of time.

A heap of callbacks and not simpy: an engine's run of decode steps is planned in closed form and cut short by whatever
happens first, so nearly every wait is replaced before it fires. See `benchmarks/schedule.py --loops` for the measured
difference.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Callback = Callable[[], None]


class Timer:
    """One scheduled callback; `cancel` keeps it from being called."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """Simulated time, s. Callbacks for the same moment are called in the order they were asked for."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0

    def at(self, when: float, callback: Callback) -> Timer:
        """Call `callback` at `when`, or now if that has passed."""
        timer = Timer(callback)
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, timer))
        return timer

    def step(self) -> bool:
        """Run the next callback; False when there is none."""
        while self._heap:
            when, _, timer = heapq.heappop(self._heap)
            if timer.callback is not None:
                self.now = when
                timer.callback()
                return True
        return False
