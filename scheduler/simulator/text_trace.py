"""Recorded prompts with the lengths of their answers, as JSON lines."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from perllm.broker.errors import BadSetting, field_errors
from perllm.scheduler.simulator.csv_trace import TRACES

#: Characters per token, and those of code.
CHARACTERS, CODE_CHARACTERS = 4.2, 3.3


class _Line(BaseModel):
    kind: str = Field(alias="class")
    prompt: Annotated[str, Field(min_length=1)]
    output_chars: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class TextTrace:
    """Columns of a trace of texts. Sizes are tokens, by the convention above."""

    texts: list[str]
    classes: list[str]
    prompts: list[int]
    outputs: list[int]


@lru_cache(maxsize=4)
def read_text_trace(name: str) -> TextTrace:
    """Read JSON lines of `class`, `prompt` and `output_chars`, gzipped or not, by packaged name or path.

    Raises BadSetting naming file, line and field.
    """
    path = TRACES / f"{name}.jsonl" if "/" not in name and ".jsonl" not in name else Path(name)
    trace = TextTrace([], [], [], [])
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    _add(trace, text, f"trace {path}, line {number}")
    except (OSError, EOFError) as error:
        raise BadSetting(f"trace {path}: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise BadSetting(f"trace {path}: not UTF-8 text") from None
    if not trace.texts:
        raise BadSetting(f"trace {path}: no prompts in it")
    return trace


def _add(trace: TextTrace, text: str, where: str) -> None:
    try:
        line = _Line.model_validate_json(text)
    except ValidationError as error:
        raise BadSetting(f"{where}: {field_errors(error)}") from None
    per_token = CODE_CHARACTERS if line.kind == "code" else CHARACTERS
    trace.texts.append(line.prompt)
    trace.classes.append(line.kind)
    trace.prompts.append(max(1, round(len(line.prompt) / per_token)))
    trace.outputs.append(max(1, round(line.output_chars / per_token)))
