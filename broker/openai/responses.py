"""Responses, both ways.

Source: OpenAI API reference, "Responses". What a response repeats of its request, and no task needs, is kept with the
task (`TaskSpec.request`), so that it can be retrieved as it was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Message, Result, State, TaskSpec
from perllm.broker.openai import items, tools
from perllm.broker.openai.receipts import receipt_fields
from perllm.broker.openai.requests import ResponseRequest, given
from perllm.broker.openai.sampling import ANY_MODEL, effort, output_format, shared

_OWN = (
    "input", "instructions", "max_output_tokens", "top_logprobs", "previous_response_id", "text", "reasoning",
    "include", "n", "truncation", "context_management", "background_options",
)  # fmt: skip
#: What may be included: log probabilities, and what belongs to items that never occur here.
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = frozenset((
    _LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
))  # fmt: skip
_WINDOWS = {"soonest": None, "2h": 7200.0, "8h": 28800.0}  # s
_VERBOSITIES = ("low", "medium", "high")
_SUMMARIES = ("auto", "concise", "detailed")


# --- requests


def fields(body: Mapping[str, Any], before: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A TaskSpec's fields from a request's body, which goes on from the turns `before`. Raises InvalidTask."""
    asked = given(ResponseRequest, body)
    if before is None and "previous_response_id" in asked:
        raise InvalidTask("previous_response_id: a batch's lines stand for themselves")
    before = before or ()
    made = shared({name: value for name, value in asked.items() if name not in _OWN})
    if "input" not in asked:
        raise InvalidTask("input: this field is required")
    called = [call["id"] for turn in before for call in turn.get("tool_calls") or ()]
    turns = [*before, *items.input_turns(asked["input"], called)]
    if (instructions := asked.get("instructions")) is not None:
        if not isinstance(instructions, str):
            raise InvalidTask("instructions: only a string is supported")
        turns = [{"role": "system", "content": instructions}, *turns]
    made["messages"] = turns
    if "max_output_tokens" in asked:
        made["max_tokens"] = asked["max_output_tokens"]
    if (most := _logprobs(asked)) is not None:
        made["logprobs"] = most
    if "text" in asked:
        made.update(_text_format(asked["text"]))
    if "reasoning" in asked and (wanted := _effort(asked["reasoning"])) is not None:
        made["reasoning_effort"] = effort(wanted)
    if "background_options" in asked and (window := _window(asked["background_options"])) is not None:
        made.setdefault("deadline", window)
    if repeated := _repeated(asked):
        made["request"] = repeated
    return made


def _logprobs(asked: Mapping[str, Any]) -> Any:
    include = asked.get("include", [])
    if not isinstance(include, list) or not all(isinstance(each, str) for each in include):
        raise InvalidTask("include: a list of names is required")
    if unknown := [each for each in include if each not in _INCLUDABLE]:
        raise InvalidTask(f"include: {unknown[0][:80]!r} is not known")
    return asked.get("top_logprobs", 0 if _LOGPROBS in include else None)


def _window(value: Any) -> float | None:
    if not isinstance(value, dict) or set(value) - {"completion_window", "continuation_id"}:
        raise InvalidTask("background_options: a 'completion_window' is supported")
    window = value.get("completion_window", "soonest")
    if not isinstance(window, str) or window not in _WINDOWS:
        raise InvalidTask(f"background_options.completion_window: one of {', '.join(_WINDOWS)} is required")
    return _WINDOWS[window]


def _text_format(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) - {"format", "verbosity"}:
        raise InvalidTask("text: 'format' and 'verbosity' are supported")
    if value.get("verbosity") not in (None, *_VERBOSITIES):
        raise InvalidTask(f"text.verbosity: one of {', '.join(_VERBOSITIES)} is required")
    wanted = value.get("format")
    return {} if wanted is None else output_format("text.format", wanted)


def _effort(value: Any) -> Any:
    if not isinstance(value, dict):
        raise InvalidTask("reasoning: an object is required")
    if unknown := set(value) - {"effort", "summary", "generate_summary", "context", "mode"}:
        raise InvalidTask(f"reasoning.{min(unknown)}: not a field of this request")
    if value.get("mode") not in (None, "standard"):
        raise InvalidTask("reasoning.mode: only 'standard' is supported")
    if value.get("summary") not in (None, *_SUMMARIES):
        raise InvalidTask(f"reasoning.summary: one of {', '.join(_SUMMARIES)} is required")
    return value.get("effort")


def _repeated(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the response repeats of its request, beside what the task tells by itself: short values, all checked."""
    flags = ("background", "instructions")
    kept: dict[str, Any] = {name: True for name in flags if asked.get(name, False) is not False}
    if isinstance(previous := asked.get("previous_response_id"), str):
        kept["previous_response_id"] = previous
    text, reasoning = asked.get("text") or {}, asked.get("reasoning") or {}
    wanted = text.get("format") or {}
    shape = wanted.get("json_schema", wanted) if wanted.get("type") == "json_schema" else {}
    if isinstance(name := shape.get("name"), str) and len(name) <= 64:
        kept["schema_name"] = name
    if shape.get("strict") is True:
        kept["schema_strict"] = True
    if wanted.get("type") == "json_object":
        kept["json_object"] = True
    if (verbosity := text.get("verbosity")) is not None:
        kept["verbosity"] = verbosity
    if (summary := reasoning.get("summary")) is not None:
        kept["summary"] = summary
    return kept


def turns_after(spec: TaskSpec, result: Result) -> list[dict[str, Any]]:
    """The turns of a response that has an output, and its answer, for another one to go on from. Its instructions do
    not carry over."""
    assert result.output is not None
    asked = [Message(role="user", content=spec.prompt)] if spec.messages is None else list(_input(spec))
    return [*(turn.model_dump(exclude_defaults=True) for turn in asked), items.answer_turn(result.output)]


def _input(spec: TaskSpec) -> Sequence[Message]:
    turns = spec.messages or ()
    return turns[1:] if spec.request.get("instructions") else turns


def input_items(task_id: str, spec: TaskSpec) -> list[dict[str, Any]]:
    """What a response was made of, as items."""
    return items.input_items(task_id, _input(spec))


# --- answers


def response_object(
    task_id: str, spec: TaskSpec, submitted: float, state: State, result: Result | None
) -> dict[str, Any]:
    """A task in any state as a response. `submitted` is in s since the epoch."""
    kept = spec.request
    instructed = bool(kept.get("instructions") and spec.messages)
    body: dict[str, Any] = {
        "id": task_id,
        "object": "response",
        "created_at": int(submitted),
        "status": status(state, result),
        "background": is_background(spec),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": spec.messages[0].content if instructed and spec.messages else None,
        "max_output_tokens": None if spec.fit_context else spec.max_tokens,
        "metadata": dict(spec.metadata),
        "model": spec.model or ANY_MODEL,
        "output": [],
        "parallel_tool_calls": spec.parallel_tool_calls,
        "previous_response_id": kept.get("previous_response_id"),
        "reasoning": {"effort": spec.reasoning_effort, "summary": kept.get("summary")},
        "temperature": spec.temperature,
        "text": {"format": _shown_format(spec), "verbosity": kept.get("verbosity", "medium")},
        "tool_choice": tools.response_choice(spec),
        "tools": tools.response_tools(spec),
        "top_logprobs": spec.logprobs or 0,
        "top_p": spec.top_p,
        "truncation": "disabled",
        "usage": None,
        "energy": None,
        "node": None,
        "on_time": None,
        "latency": None,
    }
    if result is not None:
        body.update(_outcome(result, body["status"], summarised=is_summarised(spec)))
        body["completed_at"] = int(submitted + result.latency) if body["status"] == "completed" else None
    return body


def _shown_format(spec: TaskSpec) -> dict[str, Any]:
    if spec.json_schema is None:
        return {"type": "text"}
    if spec.request.get("json_object"):
        return {"type": "json_object"}
    name, strict = spec.request.get("schema_name", "schema"), bool(spec.request.get("schema_strict"))
    return {"type": "json_schema", "name": name, "schema": spec.json_schema, "strict": strict, "description": None}


def status(state: State, result: Result | None) -> str:
    """A task's state as a response's."""
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


def _outcome(result: Result, status: str, *, summarised: bool) -> dict[str, Any]:
    body: dict[str, Any] = receipt_fields(result)
    if result.output is not None:
        ended = "completed" if status == "completed" else "incomplete"
        body["output"] = items.output_items(result.id, result.output, ended, summarised=summarised)
    if receipt := result.receipt:
        body["model"] = receipt.model
        body["usage"] = {
            "input_tokens": receipt.prompt_tokens,
            "input_tokens_details": {"cached_tokens": receipt.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": receipt.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": receipt.reasoning_tokens},
            "total_tokens": receipt.prompt_tokens + receipt.completion_tokens,
        }
    if status == "failed":
        body["error"] = {"code": f"task_{result.state}", "message": result.reason or str(result.state)}
    elif status == "incomplete":
        reason = "max_output_tokens" if result.state is State.SUCCEEDED else "deadline"
        body["incomplete_details"] = {"reason": reason}
    return body


def is_background(spec: TaskSpec) -> bool:
    """Whether it is a response whose client did not wait for it."""
    return bool(spec.request.get("background"))


def is_summarised(spec: TaskSpec) -> bool:
    """Whether what the model thinks is given as a summary: it was asked for, and the whole thought stands for it."""
    return bool(spec.request.get("summary"))
