"""llama.cpp in place of vLLM, on a machine without a GPU: all that this package takes from the edge worker."""

from __future__ import annotations

from perllm.broker.engine.contract import Engine
from perllm.broker.settings import load_settings
from perllm.cloud_worker.settings import CloudSettings
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.settings import EdgeSettings


def cpu_engine(settings: CloudSettings, why: str) -> Engine:
    """The edge engine with the settings of an edge node. Says what it is and `why` wherever the node is shown.
    Raises BadSetting."""
    edge = load_settings(EdgeSettings, **settings.model_dump(exclude_unset=True))
    return LlamaEngine(edge, note=f"on the CPU: {why}")
