"""Settings of engines."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from perllm.broker.settings import Settings


class EngineSettings(Settings):
    """What any engine may need, and the figures its energy is estimated by."""

    files_or_names: ClassVar[tuple[str, ...]] = (*Settings.files_or_names, "model")

    model: str | None = None  # a GGUF path (llama.cpp), a Hugging Face folder or name (vLLM), a name (remote server)
    model_name: str | None = None  # the name producers use; default: derived from the model
    slots: Annotated[int, Field(ge=1, le=4096)] | None = None  # tasks in the engine at once
    context: Annotated[int, Field(ge=64)] | None = None  # tokens per sequence
    threads: Annotated[int, Field(ge=1)] | None = None
    joules_per_byte: Annotated[float, Field(ge=0)] = 0.0  # of the node's link
    idle_watts: Annotated[float, Field(ge=0)] | None = None
    tdp_watts: Annotated[float, Field(gt=0)] | None = None
    emulated_speed: Annotated[float, Field(gt=0)] | None = None  # tokens/s of the emulated engine; None: at once
