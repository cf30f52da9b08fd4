"""Settings of nodes, beside those of their engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from perllm.broker.engine.settings import EngineSettings
from perllm.broker.messages import NodeName


class WorkerSettings(EngineSettings):
    """The settings of a node worker."""

    node_name: NodeName | None = None
    """The node's name; unset: the machine's."""
    engine: Literal["auto", "llama", "vllm", "openai", "emulated"] = "auto"
    """Which engine serves; `auto`: llama.cpp on edges, vLLM on clouds with a GPU."""
    bandwidth: Annotated[float, Field(gt=0)] = 12.5e6
    """Bytes/s of the node's link, until measured."""
