"""Simulated time: callbacks at moments, on simpy's event queue.

Callbacks and not simpy's processes: an engine's run of decode steps is planned in closed form and cut short by whatever
happens first, which a callback that can be cancelled says more plainly than a process that is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable

from simpy import Environment
from simpy.events import Timeout

Callback = Callable[[], None]


class Timer:
    """One scheduled callback; `cancel` keeps it from being called."""

    __slots__ = ("_event",)

    def __init__(self, event: Timeout) -> None:
        self._event = event

    def cancel(self) -> None:
        """Do not call it. Harmless when it was called already."""
        self._event.callbacks = []


class Clock:
    """Simulated time, s. Callbacks for the same moment are called in the order they were asked for."""

    def __init__(self, now: float = 0.0) -> None:
        self._simpy = Environment(now)

    @property
    def now(self) -> float:
        """The present, s."""
        return float(self._simpy.now)

    def at(self, when: float, callback: Callback) -> Timer:
        """Call `callback` at `when`, or now if that has passed."""
        event = self._simpy.timeout(max(when - self._simpy.now, 0.0))
        event.callbacks.append(lambda _: callback())
        return Timer(event)

    def step(self) -> bool:
        """Run the next callback; False when there is none."""
        if self._simpy.peek() == float("inf"):
            return False
        self._simpy.step()
        return True
