"""`python -m perllm.broker.api`: the HTTP API, as `perllm api` starts it."""

from __future__ import annotations

from perllm.broker.api.cli import app
from perllm.broker.errors import PerLLMError, exit_with

try:
    app(prog_name="perllm api")
except PerLLMError as error:
    exit_with(error)
