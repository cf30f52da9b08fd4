"""An engine's running totals, over all its models: what its `Counters` are made of."""

from __future__ import annotations

import time

from perllm.broker.messages import Counters


class EngineTotals:
    """Written by the one thread that steps the engine, read from any."""

    def __init__(self) -> None:
        self.steps = self.generated = self.prefilled = self.sequence_steps = self.context_steps = 0
        self.busy = 0.0  # s in steps
        self.last_progress = 0.0  # when a step last ended, or work came after there was none (monotonic)
        self._longest = (0.0, 0.0)  # step, s, of this half minute and of the last
        self._half_minute = 0

    def step(self, began: float, ended: float, *, sequences: int, prefilled: int, context: int) -> None:
        """A step ended. Times are `time.monotonic()`."""
        self.steps += 1
        self.busy += ended - began
        self.sequence_steps += sequences
        self.prefilled += prefilled
        self.context_steps += context
        self.last_progress = ended
        self._turn(ended)
        self._longest = (max(self._longest[0], ended - began), self._longest[1])

    def longest_step(self, now: float) -> float:
        """Of the last 30 to 60 seconds, s."""
        self._turn(now)
        return max(self._longest)

    def counters(self, *, active: int, waiting: int = 0, free_kv: int, energy: float) -> Counters:
        """These totals with the engine's present state: requests in the batch and waiting for it, tokens of KV cache
        free, and its meter's J."""
        now = time.monotonic()
        return Counters(
            steps=self.steps,
            busy=self.busy,
            generated=self.generated,
            prefilled=self.prefilled,
            sequence_steps=self.sequence_steps,
            context_steps=self.context_steps,
            active=active,
            waiting=waiting,
            free_kv=free_kv,
            since_progress=max(0.0, now - self.last_progress) if active or waiting else 0.0,
            longest_step=self.longest_step(now),
            energy=energy,
        )

    def _turn(self, now: float) -> None:
        if (half := int(now // 30)) != self._half_minute:
            self._longest = (0.0, self._longest[0] if half == self._half_minute + 1 else 0.0)
            self._half_minute = half
