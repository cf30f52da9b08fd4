"""An engine without a model, for tests and for measuring everything but the model. It says so wherever it is shown.

It "generates" `max_tokens` words for each answer at a set speed shared by nobody (or at once), honours `Stop`, and its
joules are emulated. Its "embeddings" are digests: the same for the same text, of length 1, and without meaning; so are
its scores.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from typing import Literal

import numpy as np

from perllm.broker.capabilities import Capability
from perllm.broker.engine.checks import fitted
from perllm.broker.engine.contract import Generation, OnDelta, Stop, Stuck
from perllm.broker.engine.embedding import Vector, check_dimensions, check_input, made_of
from perllm.broker.engine.settings import EngineSettings
from perllm.broker.messages import Choice, Counters, Delta, Energy, ModelOffer, Output, Power, StepCost, TaskSpec

METHOD = "emulated"
#: Whatever is asked, it says the same words: nothing that would show in them is offered.
CAPABILITIES = (
    Capability.CHAT,
    Capability.CHOICES,
    Capability.EMBEDDINGS,
    Capability.GENERATE,
    Capability.RERANK,
    Capability.TOKENS,
)
_IDLE_WATTS, _ACTIVE_WATTS = 1.0, 4.0
#: Numbers of an embedding.
_WIDTH = 384
#: Seconds between two polls of `Stop`, at most.
_STOP_POLL = 0.02


class EmulatedEngine:
    """See the module's head. `speed` in tokens/s per sequence, None for no delay at all."""

    def __init__(self, settings: EngineSettings) -> None:
        self.slots = settings.slots or 4
        self._speed = settings.emulated_speed
        self._context = settings.context or 4096
        self._name = settings.model_name or "emulated"
        self.description = f"emulated, {'no delay' if self._speed is None else f'{self._speed:g} tokens/s'}"
        self._lock = threading.Lock()
        self._progress: dict[str, int] = {}
        self._steps = self._generated = self._prefilled = self._sequence_steps = 0
        self._busy = 0.0

    def start(self) -> None:
        """Nothing to load."""

    def offers(self) -> tuple[ModelOffer, ...]:
        step = 0.0 if self._speed is None else 1.0 / self._speed
        cost = StepCost(step=step, sequence=0.0, prefill=0.0)
        offer = ModelOffer(
            name=self._name,
            context=self._context,
            kv_tokens=self._context * self.slots,
            calibration=cost,
            capabilities=CAPABILITIES,
            dimensions=_WIDTH,
        )
        return (offer,)

    def power(self) -> Power:
        return Power(idle=_IDLE_WATTS, active=_ACTIVE_WATTS, method=METHOD, estimated=True)

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        if spec.kind != "generate":
            return self._embed(spec)
        prompt_tokens = spec.text_bytes() // 4 + 1
        spec = fitted(spec, prompt_tokens, self._context)
        before = self.counters()
        began = time.monotonic()
        echo = spec.prompt or "" if spec.echo else ""
        say = None if on_delta is None else _to_all(on_delta, spec.n)
        if say is not None and echo:
            say(Delta(text=echo))
        tokens, reason = self._work(task_id, spec, stop, say)
        took = time.monotonic() - began
        with self._lock:
            self._steps += tokens
            self._generated += tokens * spec.n
            self._sequence_steps += tokens * spec.n
            self._prefilled += prompt_tokens
            self._busy += took
        text = echo + " ".join(["word"] * tokens)
        one = Choice(text=text, finish_reason=reason, tokens=tokens)
        return Generation(
            output=Output(text=text, finish_reason=reason, tokens=tokens, more=(one,) * (spec.n - 1)),
            model=self._name,
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens * spec.n,
            wait=0.0,
            prefill=0.0,
            decode=took,
            energy=Energy(inference=took * _ACTIVE_WATTS, idle=took * _IDLE_WATTS, method=METHOD, estimated=True),
            before=before,
            after=self.counters(),
        )

    def _embed(self, spec: TaskSpec) -> Generation:
        """Vectors or scores for a task's inputs, at once."""
        texts = [f"{spec.query}\0{text}" if spec.query else text for text in spec.inputs]
        tokens = [len(text) // 4 + 1 for text in texts] or [len(ids) for ids in spec.input_ids]
        texts = texts or [" ".join(map(str, ids)) for ids in spec.input_ids]
        check_dimensions(spec.dimensions, _WIDTH)
        for number, count in enumerate(tokens):
            check_input(number, count, self._context)
        before = self.counters()
        vectors = [_digest(text) for text in texts]
        with self._lock:
            self._prefilled += sum(tokens)
        return Generation(
            output=Output(text="", finish_reason="stop", **made_of(vectors, spec)),
            model=self._name,
            prompt_tokens=sum(tokens),
            completion_tokens=0,
            wait=0.0,
            prefill=0.0,
            decode=0.0,
            energy=Energy(method=METHOD, estimated=True),
            before=before,
            after=self.counters(),
        )

    def _work(
        self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None
    ) -> tuple[int, Literal["length", "deadline", "cancelled"]]:
        """Tokens "generated" of each answer, and why they ended."""
        published = 0

        def publish(tokens: int) -> None:
            nonlocal published
            if on_delta is not None and tokens > published:
                on_delta(Delta(text=" ".join([""] * (published > 0) + ["word"] * (tokens - published))))
                published = tokens

        if self._speed is None:
            publish(spec.max_tokens)
            return spec.max_tokens, "length"
        began = time.monotonic()
        with self._lock:
            self._progress[task_id] = 0
        try:
            while True:
                tokens = min(spec.max_tokens, int((time.monotonic() - began) * self._speed))
                self._progress[task_id] = tokens * spec.n
                publish(tokens)
                if tokens == spec.max_tokens:
                    return tokens, "length"
                match stop.reason:
                    case "deadline" | "cancelled" as reason:
                        return tokens, reason
                stop.wait(min(_STOP_POLL, (spec.max_tokens - tokens) / self._speed))
        finally:
            with self._lock:
                del self._progress[task_id]

    def counters(self) -> Counters:
        with self._lock:
            return Counters(
                steps=self._steps,
                busy=self._busy,
                generated=self._generated,
                prefilled=self._prefilled,
                sequence_steps=self._sequence_steps,
                active=len(self._progress),
                free_kv=self._context * (self.slots - len(self._progress)),
                energy=self._busy * (_IDLE_WATTS + _ACTIVE_WATTS),
            )

    def progress(self) -> Mapping[str, int]:
        with self._lock:
            return dict(self._progress)

    def stuck(self) -> Stuck | None:
        """Never: it only sleeps."""
        return None

    def close(self) -> None:
        """Nothing to free."""


def _to_all(on_delta: OnDelta, n: int) -> OnDelta:
    """Says the same of all answers."""

    def say(delta: Delta) -> None:
        for index in range(n):
            on_delta(delta.model_copy(update={"index": index}))

    return say


def _digest(text: str) -> Vector:
    """Numbers from −1 to 1 that follow from the text."""
    raw = hashlib.shake_128(text.encode(errors="replace")).digest(2 * _WIDTH)
    return np.frombuffer(raw, "<i2").astype(np.float32) / np.float32(32768)
