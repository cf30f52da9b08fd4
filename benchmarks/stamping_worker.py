"""The worker `benchmarks.dispatch` measures: a real node whose engine does nothing but say when it was called."""

from __future__ import annotations

import time
from dataclasses import replace

from perllm.broker.engine.contract import Generation, OnDelta, Stop
from perllm.broker.engine.emulated import EmulatedEngine
from perllm.broker.messages import Output, TaskSpec
from perllm.broker.worker.app import worker_app
from perllm.broker.worker.settings import WorkerSettings


class StampingEngine(EmulatedEngine):
    """Its output is the machine's monotonic clock when `generate` began, ns."""

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        began = time.monotonic_ns()
        done = super().generate(task_id, spec, stop, on_delta)
        return replace(done, output=Output(text=str(began), finish_reason="stop"))


app = worker_app("edge", WorkerSettings, StampingEngine)
