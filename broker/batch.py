"""The OpenAI Batch file format, both ways: a line in becomes a task's fields, a result becomes a line out.

Source: platform.openai.com, "Batch API", request input and output objects. Beside what is there, a line (or its body)
may carry `deadline`, `value`, `service` and `expected_tokens`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from broker.errors import InvalidTask
from broker.messages import Result, State

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
#: Our fields a line may carry, in the line itself or in its body.
EXTENSIONS = ("deadline", "value", "service", "expected_tokens")
#: Body fields that mean the same here under the same name.
_SAME = (
    "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repeat_penalty", "seed", "metadata", "grammar",
)  # fmt: skip
#: Body fields that change nothing here and are accepted so that existing files work.
_IGNORED = ("user", "n", "stream", "store", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch file: its number (from 1), the producer's `custom_id`, and a TaskSpec's fields, not yet
    checked."""

    number: int
    custom_id: str
    url: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request, and why."""

    number: int
    custom_id: str | None
    reason: str


def read(lines: Iterable[str]) -> Iterator[Line | BadLine]:
    """Parse a batch file line by line; empty lines are skipped, a repeated `custom_id` is an error of its line."""
    seen: set[str] = set()
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        line = _parse(number, text)
        if isinstance(line, Line):
            if line.custom_id in seen:
                line = BadLine(number, line.custom_id, f"custom_id: {line.custom_id!r} was used by an earlier line")
            seen.add(line.custom_id or "")
        yield line


def _parse(number: int, text: str) -> Line | BadLine:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        return BadLine(number, None, f"not JSON: {error.msg} at column {error.colno}")
    if not isinstance(raw, dict):
        return BadLine(number, None, "not a JSON object")
    custom_id = raw.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, None, "custom_id: a non-empty string is required")
    try:
        return Line(number, custom_id, *_fields(raw))
    except InvalidTask as error:
        return BadLine(number, custom_id, str(error))


def _fields(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    url, body = raw.get("url", CHAT), raw.get("body")
    if raw.get("method", "POST") != "POST":
        raise InvalidTask(f"method: {raw['method']!r} is not POST")
    if url not in (CHAT, COMPLETIONS):
        raise InvalidTask(f"url: {url!r} is not {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        raise InvalidTask("body: an object is required")
    extras = {k: raw[k] for k in EXTENSIONS if k in raw}
    return url, {**task_fields(body), **extras}


def task_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """A TaskSpec's fields from an OpenAI chat or completion request's body. Raises InvalidTask for a field that is
    neither OpenAI's nor ours; values are checked later, by the door."""
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _IGNORED:
            continue
        if name in _SAME or name in EXTENSIONS:
            fields[name] = value
        else:
            fields.update(_translated(name, value))
    return fields


def _translated(name: str, value: Any) -> dict[str, Any]:
    match name:
        case "model":
            return {"model": value}
        case "max_completion_tokens":
            return {"max_tokens": value}
        case "stop":
            return {"stop": [value] if isinstance(value, str) else value}
        case "logprobs" if isinstance(value, bool):
            return {"logprobs": 1} if value else {}
        case "top_logprobs" | "logprobs":
            return {"logprobs": value}
        case "response_format":
            return _response_format(value)
    raise InvalidTask(f"{name}: not a field of this request")


def _response_format(value: Any) -> dict[str, Any]:
    match value:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": schema}
    raise InvalidTask("response_format: give type text, json_object, or json_schema with a schema")


def output_line(custom_id: str, url: str, result: Result) -> dict[str, Any]:
    """A result as a line of the output file (succeeded) or of the error file (anything else)."""
    line: dict[str, Any] = {"id": f"batch_req_{result.id}", "custom_id": custom_id, "response": None, "error": None}
    if result.state is State.SUCCEEDED:
        line["response"] = {"status_code": 200, "request_id": result.id, "body": response_body(url, result)}
    else:
        line["error"] = {"code": f"task_{result.state}", "message": result.reason or str(result.state)}
    return line


def error_line(bad: BadLine) -> dict[str, Any]:
    """A line that was no request, as a line of the error file."""
    message = f"line {bad.number}: {bad.reason}"
    return {
        "id": None,
        "custom_id": bad.custom_id,
        "response": None,
        "error": {"code": "invalid_request", "message": message},
    }


def response_body(url: str, result: Result) -> dict[str, Any]:
    """A succeeded task as an OpenAI response body, with its receipt's energy and node beside the usual usage."""
    receipt, output = result.receipt, result.output
    assert receipt is not None
    assert output is not None
    choice: dict[str, Any] = {"index": 0, "finish_reason": output.finish_reason, "logprobs": None}
    if url == CHAT:
        choice["message"] = {"role": "assistant", "content": output.text}
        if output.logprobs is not None:
            choice["logprobs"] = {"content": output.logprobs}
    else:
        choice["text"] = output.text
    energy = receipt.energy
    return {
        "id": result.id,
        "object": "chat.completion" if url == CHAT else "text_completion",
        "created": int(time.time()),
        "model": receipt.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": receipt.prompt_tokens,
            "completion_tokens": receipt.completion_tokens,
            "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        },
        "energy": {**energy.model_dump(), "total": energy.total},
        "node": receipt.node,
        "on_time": result.on_time,
        "latency": result.latency,
    }
