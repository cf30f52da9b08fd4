"""An engine's running totals, over all its models: what its `Counters` are made of."""

from __future__ import annotations

import time

from perllm.broker.messages import Counters, StepTotals


class EngineTotals:
    """Written by the one thread that steps the engine, read from any."""

    def __init__(self) -> None:
        self.steps = self.generated = self.prefilled = self.sequence_steps = self.context_steps = 0
        self.busy = 0.0  # s in steps
        self.last_progress = 0.0  # when a step last ended, or work came after there was none (monotonic)
        self._longest = (0.0, 0.0)  # step, s, of this half minute and of the last
        self._half_minute = 0
        self._models: dict[str, ModelTotals] = {}

    def of(self, model: str) -> ModelTotals:
        """One model's part, of an engine that may serve several."""
        return self._models.setdefault(model, ModelTotals(self))

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
            models={name: part.read() for name, part in self._models.copy().items()} if len(self._models) > 1 else {},
        )

    def _turn(self, now: float) -> None:
        if (half := int(now // 30)) != self._half_minute:
            self._longest = (0.0, self._longest[0] if half == self._half_minute + 1 else 0.0)
            self._half_minute = half


class ModelTotals:
    """What the engine did for one of its models. Counted in the engine's totals, too."""

    def __init__(self, engine: EngineTotals) -> None:
        self._engine = engine
        self._read = StepTotals()

    def step(self, began: float, ended: float, *, sequences: int, prefilled: int, context: int) -> None:
        """As the engine's."""
        self._engine.step(began, ended, sequences=sequences, prefilled=prefilled, context=context)
        before = self._read
        self._read = StepTotals.model_construct(  # a new one: who reads has all of a step or nothing
            steps=before.steps + 1,
            busy=before.busy + ended - began,
            prefilled=before.prefilled + prefilled,
            sequence_steps=before.sequence_steps + sequences,
            context_steps=before.context_steps + context,
        )

    def generated(self) -> None:
        """One more token."""
        self._engine.generated += 1

    def read(self) -> StepTotals:
        return self._read
