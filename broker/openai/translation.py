"""The OpenAI API's bodies, both ways: a request becomes a task's fields, a result becomes a response.

Source: OpenAI API reference, "Chat Completions", "Completions (legacy)" and "Responses". Beside what is there, a
request may carry `deadline`, `value`, `service` and `expected_tokens`, and the sampling fields of `TaskSpec`; a
response carries `energy` (J by stage, the method, measured or estimated), `node`, `on_time` and `latency` (s). The id
of everything is its task's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Result, State, TaskSpec
from perllm.broker.openai import embeddings
from perllm.broker.openai.embeddings import EMBEDDINGS, RERANK, USUAL_FORM, AnswerForm
from perllm.broker.openai.requests import (
    ChatRequest,
    CompletionRequest,
    NoEffect,
    Only,
    ResponseRequest,
    marked,
)

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, RERANK)
#: Our fields a request may carry.
EXTENSIONS = ("deadline", "value", "service", "expected_tokens")
#: A model's name that means any, for clients that must give one.
ANY_MODEL = "auto"

_COMPLETION_FIELDS = frozenset((*ChatRequest.model_fields, *CompletionRequest.model_fields))
#: What a request of each endpoint may carry. A batch's line may give a prompt to the one, messages to the other.
_FIELDS = {
    CHAT: _COMPLETION_FIELDS,
    COMPLETIONS: _COMPLETION_FIELDS,
    RESPONSES: frozenset(ResponseRequest.model_fields),
}
#: Fields that are a task's under another name or in another form.
_TRANSLATED = frozenset((
    "model", "messages", "max_completion_tokens", "stop", "logprobs", "top_logprobs", "response_format",
    "input", "instructions", "text", "max_output_tokens", "previous_response_id",
))  # fmt: skip
#: Fields that say how to answer, or nothing: no part of the task.
_NO_PART = frozenset((
    "stream", "stream_options", "background", *(name for name, _ in marked(NoEffect)),
))  # fmt: skip
_ONLY = {name: marker.values for name, marker in marked(Only)}


# --- requests


def task_fields(body: Mapping[str, Any], url: str = CHAT) -> dict[str, Any]:
    """A TaskSpec's fields from a request's body. Raises InvalidTask for a field that is neither OpenAI's nor ours, or
    asks for what is not supported; other values are checked with the task."""
    if url in (EMBEDDINGS, RERANK):
        return embeddings.task_fields(body, url)
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _NO_PART:
            continue
        if name not in _FIELDS[url]:
            raise InvalidTask(f"{name}: not a field of this request")
        if name in _ONLY:
            if not any(value == usual and type(value) is type(usual) for usual in _ONLY[name]):
                raise InvalidTask(f"{name}: only {' or '.join(map(repr, _ONLY[name]))} is supported")
        elif name in _TRANSLATED:
            fields.update(_translated(name, value))
        else:
            fields[name] = value
    if isinstance(fields.get("prompt"), list) and len(fields["prompt"]) == 1:
        fields["prompt"] = fields["prompt"][0]
    if url == RESPONSES:
        fields.update(_from_response_request(body))
    return fields


def _translated(name: str, value: Any) -> dict[str, Any]:
    match name:
        case "model":
            return {} if value == ANY_MODEL else {"model": value}
        case "messages":
            return {"messages": messages(value)}
        case "max_completion_tokens":
            return {"max_tokens": value}
        case "stop":
            return {"stop": [value] if isinstance(value, str) else value}
        case "logprobs" if isinstance(value, bool):
            return {"logprobs": 1} if value else {}
        case "top_logprobs" | "logprobs":
            return {"logprobs": value}
        case "response_format":
            return _format(name, value)
        case "input" | "instructions" | "text" | "max_output_tokens":  # of a response: see _from_response_request
            return {}
    raise InvalidTask(f"{name}: not a field of this request")


def _from_response_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """What is said otherwise in the Responses API."""
    given = body.get("input")
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else messages(given, "input")
    if (instructions := body.get("instructions")) is not None:
        if not isinstance(instructions, str):
            raise InvalidTask("instructions: only a string is supported")
        turns = [{"role": "system", "content": instructions}, *turns]
    fields: dict[str, Any] = {"messages": turns}
    if (limit := body.get("max_output_tokens")) is not None:
        fields["max_tokens"] = limit
    match body.get("text") or None:
        case None:
            pass
        case {"format": wanted, **more} if not set(more) - {"verbosity"}:
            fields.update(_format("text.format", wanted))
        case _:
            raise InvalidTask("text: only 'format' is supported")
    return fields


def seconds_left(deadline: str, now: float) -> float:
    """A deadline given as text, in s from `now` (s since the epoch): a number of seconds, or a time (RFC 3339). Raises
    InvalidTask."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", deadline):
        return float(deadline)
    moment: datetime | None
    try:
        moment = datetime.fromisoformat(deadline)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        form = "give seconds, or a time with its zone as in 2026-11-20T12:00:00Z"
        raise InvalidTask(f"deadline: {form} (given {deadline[:40]!r})")
    left = moment.timestamp() - now
    if left <= 0:
        raise InvalidTask(f"deadline: {deadline} has passed")
    return left


def messages(turns: Any, field: str = "messages") -> Any:
    """Chat turns with plain text: `developer` is the system, and content given in parts is joined."""
    if not isinstance(turns, list):
        raise InvalidTask(f"{field}: a list of messages is required")
    return [_message(turn, f"{field}.{number}") for number, turn in enumerate(turns)]


def _message(turn: Any, field: str) -> Any:
    if not isinstance(turn, dict) or turn.get("type", "message") != "message":
        raise InvalidTask(f"{field}: only messages with a role and a content are supported")
    unknown = set(turn) - {"role", "content", "name", "type", "id", "status", "refusal", "annotations", "phase"}
    if unknown and any(turn[name] is not None for name in unknown):
        raise InvalidTask(f"{field}.{min(unknown)}: not supported")
    role, content = turn.get("role"), turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{field}.content.{number}") for number, part in enumerate(content))
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, field: str) -> str:
    match part:
        case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return text
    raise InvalidTask(f"{field}: only text parts are supported")


def _format(field: str, value: Any) -> dict[str, Any]:
    match value:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": schema}
        case {"type": "json_schema", "schema": dict(schema)}:
            return {"json_schema": schema}
    raise InvalidTask(f"{field}: give type text, json_object, or json_schema with a schema")


# --- responses


def response_pieces(
    url: str, result: Result, spec: TaskSpec, submitted: float, form: AnswerForm = USUAL_FORM
) -> Iterator[str]:
    """A succeeded task as the JSON its endpoint answers with, in pieces."""
    if url in (EMBEDDINGS, RERANK):
        return embeddings.response_pieces(url, result, spec, form, receipt_fields(result))
    return iter([json.dumps(response_body(url, result, spec, submitted), ensure_ascii=False)])


def response_body(url: str, result: Result, spec: TaskSpec, submitted: float) -> dict[str, Any]:
    """A succeeded task as the body its endpoint answers with."""
    if url == RESPONSES:
        return response_object(result.id, spec, submitted, result.state, result)
    receipt, output = result.receipt, result.output
    assert receipt is not None
    assert output is not None
    choice: dict[str, Any] = {"index": 0, "finish_reason": output.finish_reason, "logprobs": None}
    if url == CHAT:
        choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
        if output.logprobs is not None:
            choice["logprobs"] = {"content": output.logprobs, "refusal": None}
    else:
        choice["text"] = output.text
        if output.logprobs is not None:
            choice["logprobs"] = _legacy_logprobs(output.logprobs)
    return {
        "id": result.id,
        "object": "chat.completion" if url == CHAT else "text_completion",
        "created": int(submitted),
        "model": receipt.model,
        "choices": [choice],
        "usage": usage(result),
        **receipt_fields(result),
    }


def usage(result: Result) -> dict[str, Any]:
    """Tokens, as the completion endpoints name them."""
    receipt = result.receipt
    assert receipt is not None
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "completion_tokens": receipt.completion_tokens,
        "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": receipt.cached_tokens},
    }


def receipt_fields(result: Result) -> dict[str, Any]:
    """Our additions to every response."""
    receipt = result.receipt
    if receipt is None:
        return {"energy": None, "node": None, "on_time": result.on_time, "latency": result.latency}
    energy = receipt.energy
    return {
        "energy": {**energy.model_dump(), "total": energy.total},
        "node": receipt.node,
        "on_time": result.on_time,
        "latency": result.latency,
    }


def _legacy_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    offsets, at = [], 0
    for entry in entries:
        offsets.append(at)
        at += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()} for entry in entries
        ],
        "text_offset": offsets,
    }


def response_object(
    task_id: str, spec: TaskSpec, submitted: float, state: State, result: Result | None, background: bool = False
) -> dict[str, Any]:
    """A task in any state as the Responses API shows it. `submitted` is in s since the epoch."""
    turns = [m.model_dump() for m in spec.messages or ()]
    instructions = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
    body: dict[str, Any] = {
        "id": task_id,
        "object": "response",
        "created_at": int(submitted),
        "status": _status(state, result),
        "background": background,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": instructions,
        "max_output_tokens": None if spec.fit_context else spec.max_tokens,
        "metadata": dict(spec.metadata),
        "model": spec.model or ANY_MODEL,
        "output": [],
        "parallel_tool_calls": False,
        "temperature": spec.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": spec.top_p,
        "truncation": "disabled",
        "usage": None,
        "energy": None,
        "node": None,
        "on_time": None,
        "latency": None,
    }
    if spec.json_schema is not None:
        body["text"] = {"format": {"type": "json_schema", "name": "schema", "schema": spec.json_schema}}
    if result is not None:
        body.update(_outcome(result, body["status"]))
        body["completed_at"] = int(submitted + result.latency) if body["status"] == "completed" else None
    return body


def _status(state: State, result: Result | None) -> str:
    match state:
        case State.PENDING | State.DISPATCHED:
            return "queued"
        case State.RUNNING:
            return "in_progress"
        case State.CANCELLED:
            return "cancelled"
        case State.SUCCEEDED:
            cut = result is not None and result.output is not None and result.output.finish_reason == "length"
            return "incomplete" if cut else "completed"
        case State.EXPIRED:
            return "incomplete" if result is not None and result.text else "failed"
        case State.FAILED | State.REJECTED:
            return "failed"


def _outcome(result: Result, status: str) -> dict[str, Any]:
    body: dict[str, Any] = receipt_fields(result)
    if result.output is not None:
        body["output"] = [message_item(result.id, result.text, "completed" if status == "completed" else "incomplete")]
        body["output"][0]["content"][0]["logprobs"] = result.output.logprobs or []
    if receipt := result.receipt:
        body["model"] = receipt.model
        body["usage"] = {
            "input_tokens": receipt.prompt_tokens,
            "input_tokens_details": {"cached_tokens": receipt.cached_tokens},
            "output_tokens": receipt.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        }
    if status == "failed":
        body["error"] = {"code": f"task_{result.state}", "message": result.reason or str(result.state)}
    elif status == "incomplete":
        reason = "max_output_tokens" if result.state is State.SUCCEEDED else "deadline"
        body["incomplete_details"] = {"reason": reason}
    return body


def message_item(task_id: str, text: str, status: str) -> dict[str, Any]:
    """The one output item of a response."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"type": "message", "id": f"msg_{task_id}", "status": status, "role": "assistant", "content": content}
