"""`celery -A edge_worker worker`: an edge node."""

from __future__ import annotations

from broker.settings import Settings
from broker.worker.app import worker_app
from broker.worker.emulated import EmulatedEngine
from broker.worker.engine import Engine


def make_engine(settings: Settings) -> Engine:
    """llama.cpp on the CPU, unless the emulated engine is asked for."""
    if settings.engine == "emulated":
        return EmulatedEngine(settings)
    from edge_worker.engine import LlamaEngine  # noqa: PLC0415  only this needs llama-cpp-python

    return LlamaEngine(settings)


app = worker_app("edge", make_engine)
