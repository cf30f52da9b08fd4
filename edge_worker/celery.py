"""`celery -A perllm.edge_worker worker`: an edge node."""

from __future__ import annotations

from perllm.broker import extras
from perllm.broker.errors import exit_with

try:
    from perllm.broker.engine.contract import Engine
    from perllm.broker.engine.emulated import EmulatedEngine
    from perllm.broker.worker.app import worker_app
    from perllm.edge_worker.settings import EdgeSettings
except ModuleNotFoundError as error:
    exit_with(extras.lacking("the edge worker", error, "edge"))


def make_engine(settings: EdgeSettings) -> Engine:
    """llama.cpp on the CPU, unless the emulated engine is asked for."""
    if settings.engine == "emulated":
        return EmulatedEngine(settings)
    from perllm.edge_worker.engine import LlamaEngine  # noqa: PLC0415  only this needs llama-cpp-python

    return LlamaEngine(settings)


app = worker_app("edge", EdgeSettings, make_engine)
