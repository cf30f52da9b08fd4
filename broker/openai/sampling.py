"""The fields that requests for text share, in a task's terms: other engines' names for them, forms of output."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.openai import tools

#: A model's name that means any, for clients that must give one.
ANY_MODEL = "auto"
#: Fields that say how to answer, or name the request's own input: no part of the task as they stand.
_NO_PART = frozenset(("stream", "stream_options", "background"))
_EFFORTS = {"max": "xhigh"}


def shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """A TaskSpec's fields from what a request gives; what is not shared stays as it is. Raises InvalidTask."""
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in _NO_PART:
            continue
        match name:
            case "model":
                if value != ANY_MODEL:
                    fields["model"] = value
            case "stop":
                fields["stop"] = [value] if isinstance(value, str) else value
            case "top_k":
                fields["top_k"] = 0 if value == -1 and not isinstance(value, bool) else value
            case "seed":
                fields["seed"] = value % 2**32 if isinstance(value, int) and not isinstance(value, bool) else value
            case "repetition_penalty":
                fields["repeat_penalty"] = value
            case "tools":
                fields["tools"] = tools.tools(value)
            case "tool_choice":  # looked at once all tools are known
                pass
            case "response_format":
                fields.update(output_format(name, value))
            case "guided_json":
                fields["json_schema"] = _schema(name, value)
            case "guided_grammar":
                fields["grammar"] = value
            case "guided_choice":
                fields["grammar"] = _one_of(name, value)
            case "structured_outputs":
                fields.update(_structured(name, value))
            case "reasoning_effort":
                fields[name] = effort(value)
            case _:
                fields[name] = value
    if "tool_choice" in given:
        fields.update(tools.choice(given["tool_choice"], fields.get("tools", [])))
    return fields


def effort(value: Any) -> Any:
    """A reasoning effort; one above our highest is our highest."""
    return _EFFORTS.get(value, value) if isinstance(value, str) else value


def output_format(field: str, value: Any) -> dict[str, Any]:
    """A task's schema from a `response_format` or a `text.format`. Raises InvalidTask."""
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


def _schema(field: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidTask(f"{field}: is not JSON") from None


def _one_of(field: str, value: Any) -> str:
    """A grammar of these texts."""
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise InvalidTask(f"{field}: a list of texts is required")
    return "root ::= " + " | ".join(_quoted(each) for each in value)


def _quoted(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def _structured(field: str, value: Any) -> dict[str, Any]:
    match value:
        case {"json": schema} if len(value) == 1:
            return {"json_schema": _schema(f"{field}.json", schema)}
        case {"json_object": True} if len(value) == 1:
            return {"json_schema": {"type": "object"}}
        case {"choice": texts} if len(value) == 1:
            return {"grammar": _one_of(f"{field}.choice", texts)}
        case {"grammar": grammar} if len(value) == 1:
            return {"grammar": grammar}
    raise InvalidTask(f"{field}: give exactly one of 'json', 'json_object', 'choice' and 'grammar'")


#: A task's fields by the names that requests have for them.
_NAMES = {
    "max_tokens": ("max_completion_tokens", "max_output_tokens"),
    "repeat_penalty": ("repetition_penalty",),
    "json_schema": ("response_format", "text", "guided_json", "structured_outputs"),
    "grammar": ("guided_grammar", "guided_choice", "structured_outputs"),
    "reasoning_effort": ("reasoning",),
    "logprobs": ("top_logprobs",),
    "allowed_tools": ("tool_choice",),
    "prompt_ids": ("prompt",),
    "messages": ("input",),
    "tools": ("functions",),
    "tool_choice": ("function_call",),
}
#: What a model must be able to do, by the field that asks for it.
_NEEDS = {
    "reasoning": ("reasoning_effort",),
    "infill": ("suffix",),
    "choices": ("n",),
    "tokens": ("prompt", "input"),
    "chat": ("messages", "input"),
}


def as_asked(said: str, given: Collection[str]) -> str:
    """What is wrong with a task's fields, said of the fields a request gave."""
    return "; ".join(_of_request(each, given) for each in said.split("; "))


def _of_request(said: str, given: Collection[str]) -> str:
    field, colon, what = said.partition(": ")
    need = field.partition(",")[0]
    if need not in given and (asking := next((name for name in _NEEDS.get(need, ()) if name in given), None)):
        return f"{asking}: {said}"
    own, _, inner = field.partition(".")
    name = next((name for name in _NAMES.get(own, ()) if name in given and own not in given), None)
    if not colon or name is None:
        return said
    kept = f".{inner}" if inner and own == "tools" else ""  # their places are the same; others' are not
    return f"{name}{kept}: {what}"
