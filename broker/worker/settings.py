"""Settings of nodes, beside those of their engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from perllm.broker.engine.settings import EngineSettings
from perllm.broker.messages import NodeName


class WorkerSettings(EngineSettings):
    """The settings of a node worker."""

    node_name: NodeName | None = None  # default: the machine's name
    engine: Literal["auto", "llama", "vllm", "openai", "emulated"] = "auto"
    grace: Annotated[float, Field(ge=0, le=3600)] = 10.0  # running work may finish for so long after SIGTERM
    bandwidth: Annotated[float, Field(gt=0)] = 12.5e6  # bytes/s of the node's link, until measured
