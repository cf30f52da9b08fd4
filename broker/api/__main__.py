"""`python -m perllm.broker.api`: the HTTP API, as `perllm api` starts it."""

from __future__ import annotations

from perllm.broker import extras
from perllm.broker.errors import PerLLMError, exit_with

try:
    from perllm.broker.api.cli import app
except ModuleNotFoundError as error:
    exit_with(extras.lacking("perllm api", error, *extras.COMMANDS["api"]))

try:
    app(prog_name="perllm api")
except PerLLMError as error:
    exit_with(error)
