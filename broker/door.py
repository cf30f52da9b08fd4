"""The one way in: whatever a producer sends becomes a `TaskSpec` here, or one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from broker.errors import InvalidTask, field_errors
from broker.messages import TaskSpec
from broker.settings import Settings


def accept(fields: Mapping[str, Any], settings: Settings) -> TaskSpec:
    """Check a producer's task. Raises InvalidTask naming every field that is wrong."""
    try:
        spec = TaskSpec.model_validate(dict(fields))
    except ValidationError as error:
        raise InvalidTask(field_errors(error)) from None
    size = spec.text_bytes()
    if size > settings.max_prompt_bytes:
        field = "prompt" if spec.prompt is not None else "messages"
        limit = settings.max_prompt_bytes
        raise InvalidTask(f"{field}: {size} bytes; the limit is {limit} bytes (PERLLM_MAX_PROMPT_BYTES)")
    return spec
