"""What a worker needs of an inference engine. llama.cpp, vLLM and remote engines all stand behind this.

`generate` is called from many Celery threads at once and blocks; the engine batches them as it can. It never outlives
its `Stop`: within one engine step of its being cancelled, the call returns what it has. A task's `n` answers are one
call, with one receipt: what ends it, or fails, ends all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from perllm.broker.messages import Counters, Delta, Energy, ModelOffer, Output, Power, TaskSpec

#: Why a generation ended.
FinishReason = Literal["stop", "length", "tool_calls", "deadline", "cancelled"]


class Stop:
    """A request to end a generation: by `cancel`, or by a deadline that passes (s from now, this machine's clock)."""

    def __init__(self, deadline: float | None = None) -> None:
        self._cancelled = threading.Event()
        self._until = None if deadline is None else time.monotonic() + deadline

    def cancel(self) -> None:
        """End the generation: its task was cancelled, its lease was lost, or the worker stops."""
        self._cancelled.set()

    def bring_forward(self, seconds: float) -> None:
        """The deadline passes so much earlier."""
        if self._until is not None:
            self._until -= seconds

    def wait(self, seconds: float) -> None:
        """Sleep for so long, or until cancelled."""
        self._cancelled.wait(seconds)

    @property
    def reason(self) -> Literal["cancelled", "deadline"] | None:
        """Why to end now, or None to go on. Cheap enough to read at every step."""
        if self._cancelled.is_set():
            return "cancelled"
        if self._until is not None and time.monotonic() >= self._until:
            return "deadline"
        return None

    @property
    def remaining(self) -> float | None:
        """Seconds to the deadline (not below 0), or None without one."""
        return None if self._until is None else max(0.0, self._until - time.monotonic())


@dataclass(frozen=True, slots=True)
class Generation:
    """What one call of `Engine.generate` did. Durations in s, energies in J, counts in tokens of all answers together,
    the prompt's once."""

    output: Output
    model: str
    prompt_tokens: int
    completion_tokens: int
    wait: float  # accepted → first prefill step
    prefill: float  # first prefill step → first token
    decode: float  # first token → last token
    energy: Energy
    before: Counters
    after: Counters
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    stalled: bool = False

    @property
    def finish(self) -> FinishReason:
        """Why all of it ended: cut, if one of the answers was."""
        reasons = [choice.finish_reason for choice in self.output.choices]
        return next((reason for reason in reasons if reason in ("cancelled", "deadline")), reasons[0])


class EngineError(Exception):
    """The engine could not serve this request. `retry` says whether another node, or a later try, might."""

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


class EngineDown(EngineError):
    """The engine died and is coming back by itself. `inside` says whether the request was in it when it died: it may
    have been the cause."""

    def __init__(self, message: str, *, inside: bool) -> None:
        super().__init__(message, retry=True)
        self.inside = inside


@dataclass(frozen=True, slots=True)
class Stuck:
    """An engine that makes no progress any more, and the tasks it was computing when it ceased to: one of them may be
    the cause."""

    reason: str
    tasks: frozenset[str]


#: Called with each piece of an answer (whole UTF-8 characters) as it is generated.
OnDelta = Callable[[Delta], None]


class Engine(Protocol):
    """An inference engine, started and calibrated before it is handed to the worker."""

    #: e.g. "llama.cpp 0.3.36, 1 thread"
    description: str
    #: Answers it works on at once; those of one request that are more take turns.
    slots: int

    def start(self) -> None:
        """Load the model(s) and calibrate (seconds). Raises BadSetting with what to change."""

    def offers(self) -> tuple[ModelOffer, ...]:
        """The models served, each with the step cost measured at the start."""

    def power(self) -> Power:
        """The power model measured or assumed at boot."""

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        """Run one task to its end or until `stop`. Thread-safe, blocking.

        Raises EngineError: retry=False for a request that can never be served here (prompt beyond the context, bad
        grammar), retry=True when the engine itself failed. EngineDown: no request can be served for now.
        """

    def counters(self) -> Counters:
        """Totals since `start` and the present state. Raises EngineDown while the engine is: the node leaves the
        cluster until this answers again."""

    def progress(self) -> Mapping[str, int]:
        """Task id → tokens generated so far, of every task inside."""

    def stuck(self) -> Stuck | None:
        """Not None when a step takes longer than any working one could. Then only a new process helps."""

    def close(self) -> None:
        """Stop every generation and free the model. Idempotent."""


def counters_or_none(engine: Engine) -> Counters:
    """The engine's counters; all zero while it is down."""
    try:
        return engine.counters()
    except EngineDown:
        return Counters()
