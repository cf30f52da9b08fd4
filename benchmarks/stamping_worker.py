"""The worker `benchmarks.dispatch` and `benchmarks.api` measure: a real node whose engine does nothing but say when it
was called, and, watched, when it made each piece of its answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from perllm.broker.engine.contract import Generation, OnDelta, Stop
from perllm.broker.engine.emulated import EmulatedEngine
from perllm.broker.messages import Delta, Output, TaskSpec
from perllm.broker.worker.app import worker_app
from perllm.broker.worker.settings import WorkerSettings

#: Seconds between two pieces of a watched answer: a small model's step on a CPU.
PACE = 0.02


class StampingEngine(EmulatedEngine):
    """Its output is the machine's monotonic clock when `generate` began, ns; a watched one's is that at each piece."""

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        began = time.monotonic_ns()
        done = super().generate(task_id, spec, stop, None)
        text = str(began) if on_delta is None else "".join(_pieces(spec.max_tokens, on_delta))
        return replace(done, output=Output(text=text, finish_reason="stop"))


def _pieces(count: int, on_delta: OnDelta) -> Iterator[str]:
    for _ in range(count):
        time.sleep(PACE)
        piece = f"{time.monotonic_ns()} "
        on_delta(Delta(text=piece))
        yield piece


app = worker_app("edge", WorkerSettings, StampingEngine)
