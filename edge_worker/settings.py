"""Settings of edge nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from perllm.broker.settings import AbsolutePath
from perllm.broker.worker.settings import WorkerSettings


def _default_model_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "perllm" / "models"


class EdgeSettings(WorkerSettings):
    """The settings of an edge node, and of llama.cpp wherever it serves."""

    pooling: Literal["mean", "cls", "last"] | None = None
    """Embed too, as `<model>:embed`, the tokens' vectors pooled so; a file made for embedding says it itself."""
    variants: str | None = None
    """Quantisations of the model to offer, e.g. `q8_0,q4_0`; the first is the default."""
    model_cache: AbsolutePath = Field(default_factory=_default_model_cache)
    """Where quantisations made from other files are kept; `~/.cache/perllm/models` unless set."""
    model_memory: Annotated[int, Field(gt=0)] | None = None
    """Bytes loaded models may take; unset: what is free."""
