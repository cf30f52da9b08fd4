"""Settings of cloud nodes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SecretStr

from perllm.broker.settings import AbsolutePath
from perllm.broker.worker.settings import WorkerSettings


class CloudSettings(WorkerSettings):
    """The settings of a cloud node."""

    # vLLM
    vllm_args: dict[str, Any] = Field(default_factory=dict)
    """JSON: further fields of vLLM's AsyncEngineArgs."""
    tool_parser: str | None = None
    """vLLM's own parser of tool calls, by its name there (`qwen3_coder`, …), for answers that need not keep to a
    schema; unset: ours, by what the model's chat template writes."""
    reasoning_parser: str | None = None
    """vLLM's own parser of thoughts, likewise."""
    adapters: dict[str, AbsolutePath] = Field(default_factory=dict)
    """JSON: LoRA folders by name, offered as `<model>:<name>`."""

    # An OpenAI-compatible server (PERLLM_ENGINE=openai); `model` is its name there
    openai_base_url: str | None = None
    """An OpenAI-compatible server, up to and with the version: `https://host/v1`."""
    openai_api_key: SecretStr | None = None
    """Its key, or …"""
    openai_api_key_file: AbsolutePath | None = None
    """… a file that holds the key and nothing else."""
    openai_timeout: Annotated[float, Field(gt=0)] = 60.0
    """A request counts as hung after so many seconds without a byte."""
    openai_joules_per_token: Annotated[float, Field(ge=0)] | None = None
    """What a generated token is to cost, J, and …"""
    openai_joules_per_prompt_token: Annotated[float, Field(ge=0)] = 0.0
    """… a prompt's, J; of a price in money: its worth in joules."""
