"""`python -m perllm.broker.api`: the HTTP API, as `perllm api` starts it."""

from __future__ import annotations

import sys

from perllm.broker.api.cli import app
from perllm.broker.errors import PerLLMError

try:
    app(prog_name="perllm api")
except PerLLMError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
