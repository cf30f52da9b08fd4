"""An engine for the chaos tests: it replays a measured profile's step times, and some prompts hurt it. PERLLM_MODEL
names one of the simulator's profiles.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Literal

from perllm.broker.engine.contract import EngineError, OnDelta, Stop
from perllm.broker.engine.emulated import EmulatedEngine
from perllm.broker.engine.settings import EngineSettings
from perllm.broker.messages import Delta, ModelOffer, TaskSpec
from perllm.scheduler.simulator.step_table import load_table

#: A prompt with this in it ends the worker's process with this status, as an engine's crash would.
POISON, POISON_STATUS = "[poison]", 86
#: A prompt with this in it is an engine error.
FAULT = "[fault]"
#: What the model is called.
MODEL = "replay"


class ReplayEngine(EmulatedEngine):
    """A task takes its prefill step and then, per token, a decode step of as many sequences as it finds inside."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        profile = settings.model or "vllm-0.25.1_h200_llama-8b-bf16"
        self._table = load_table(profile, self.slots, time=1.0, power=1.0, cpu_watts=(1.0, 4.0))
        self._name = MODEL
        self._inside: dict[str, tuple[float, float]] = {}  # task → when its decoding begins, s per token
        self._entering = threading.Lock()
        self.description = f"emulated, replays {profile}"

    def offers(self) -> tuple[ModelOffer, ...]:
        calibration = self._table.calibration(prompt=16, output=16)
        return (super().offers()[0].model_copy(update={"calibration": calibration}),)

    def progress(self) -> Mapping[str, int]:
        now = time.monotonic()
        with self._entering:
            return {i: max(0, int((now - begin) / step)) for i, (begin, step) in self._inside.items()}

    def _work(
        self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None
    ) -> tuple[int, Literal["length", "deadline", "cancelled"]]:
        prefill = self._table.prefill(spec.text_bytes() // 4 + 1)
        with self._entering:
            active = min(len(self._inside) + 1, self.slots)
            begin, step = time.monotonic() + prefill, self._table.decode(active, 32.0 * active)
            self._inside[task_id] = begin, step
        with self._lock:
            self._progress[task_id] = 0  # only to be counted
        try:
            took = prefill + spec.max_tokens * step
            stop.wait(min(took, stop.remaining or 0.0))
            if POISON in (spec.prompt or ""):
                os._exit(POISON_STATUS)
            if FAULT in (spec.prompt or ""):
                raise EngineError("as the prompt asked for", retry=True)
            tokens = max(0, round((time.monotonic() - begin) / step))
            if on_delta is not None:
                on_delta(Delta(text=" ".join(["word"] * min(tokens, spec.max_tokens))))
            match stop.reason:
                case "deadline" | "cancelled" as reason if tokens < spec.max_tokens:
                    return tokens, reason
            return spec.max_tokens, "length"
        finally:
            with self._lock:
                del self._progress[task_id]
            with self._entering:
                del self._inside[task_id]
