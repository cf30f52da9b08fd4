"""Settings of engines."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from perllm.broker.settings import Settings


class EngineSettings(Settings):
    """What any engine may need, and the figures its energy is estimated by."""

    files_or_names: ClassVar[tuple[str, ...]] = (*Settings.files_or_names, "model")

    model: str | None = None
    """A GGUF path (llama.cpp), a Hugging Face folder or name (vLLM), or a name (remote server)."""
    model_name: str | None = None
    """The name producers use; unset: derived from the model."""
    slots: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Tasks in the engine at once."""
    context: Annotated[int, Field(ge=64)] | None = None
    """Tokens per sequence."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of the engine; unset: the free cores less one."""
    joules_per_byte: Annotated[float, Field(ge=0)] = 0.0
    """Energy of the node's link, J/byte."""
    idle_watts: Annotated[float, Field(ge=0)] | None = None
    """What the node draws idle, W; unset: measured or estimated."""
    tdp_watts: Annotated[float, Field(gt=0)] | None = None
    """Thermal design power of the CPU, W, for the estimate; unset: by the CPU's name."""
    emulated_speed: Annotated[float, Field(gt=0)] | None = None
    """Tokens/s of the emulated engine; unset: at once."""
