"""`celery -A benchmarks.cpu_vllm worker`: the cloud worker on a CPU build of vLLM, to try the benchmark without a GPU.

Its joules are made up, and say so.
"""

from __future__ import annotations

import time

from perllm.broker.worker.app import worker_app
from perllm.cloud_worker.nvml import PowerLimitMeter
from perllm.cloud_worker.settings import CloudSettings
from perllm.cloud_worker.vllm_engine import VLLMEngine


def make_engine(settings: CloudSettings) -> VLLMEngine:
    """vLLM, whichever build is installed, with an emulated meter."""
    meter = PowerLimitMeter(idle=5.0, limit=15.0, busy=time.process_time)
    meter.method = "emulated"
    return VLLMEngine(settings, meter=meter)


app = worker_app("cloud", CloudSettings, make_engine)
