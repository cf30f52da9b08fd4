"""An engine's running totals, over all its models: what its `Counters` are made of."""

from __future__ import annotations


class EngineTotals:
    """Written by the one thread that steps the engine, read from any."""

    def __init__(self) -> None:
        self.steps = self.generated = self.prefilled = self.sequence_steps = self.context_steps = 0
        self.busy = 0.0
        self.progress = 0.0  # when a step last ended, or work came after there was none
        self._longest = (0.0, 0.0)  # of this half minute and of the last
        self._half_minute = 0

    def step(self, began: float, ended: float, *, sequences: int, prefilled: int, context: int) -> None:
        """A step ended. Times are `time.monotonic()`."""
        self.steps += 1
        self.busy += ended - began
        self.sequence_steps += sequences
        self.prefilled += prefilled
        self.context_steps += context
        self.progress = ended
        self._turn(ended)
        self._longest = (max(self._longest[0], ended - began), self._longest[1])

    def longest_step(self, now: float) -> float:
        """Of the last 30 to 60 seconds, s."""
        self._turn(now)
        return max(self._longest)

    def _turn(self, now: float) -> None:
        if (half := int(now // 30)) != self._half_minute:
            self._longest = (0.0, self._longest[0] if half == self._half_minute + 1 else 0.0)
            self._half_minute = half
