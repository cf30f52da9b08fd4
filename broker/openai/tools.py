"""Tools and the choice among them, both ways.

Sources: OpenAI API reference, "Chat Completions" (a function stands in `function`) and "Responses" (it stands flat).
Both forms are taken everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import MAX_TOOLS, TaskSpec, Tool, ToolCall

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_CHOICES = ("auto", "none", "required")
_BUILT_IN = "built-in tools are not supported: offer a function of your own"
#: The forms of a function's fields.
_FORMS: tuple[tuple[str, type, str], ...] = (
    ("description", str, "a string"),
    ("parameters", dict, "an object (a JSON schema)"),
    ("strict", bool, "true or false"),
)
#: What else a function may carry, without effect.
_UNUSED = frozenset(("allowed_callers", "async", "defer_loading", "output_schema"))


def tools(value: Any, field: str = "tools") -> list[dict[str, Any]]:
    """A task's tools. Raises InvalidTask."""
    if not isinstance(value, list):
        raise InvalidTask(f"{field}: a list of functions is required")
    if len(value) > MAX_TOOLS:
        raise InvalidTask(f"{field}: {len(value)} tools; the limit is {MAX_TOOLS}")
    made = [_tool(each, f"{field}.{number}") for number, each in enumerate(value)]
    names = [tool["name"] for tool in made]
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise InvalidTask(f"{field}: two are named {twice!r}")
    return made


def _tool(value: Any, field: str) -> dict[str, Any]:
    match value:
        case {"type": "function", "function": dict(function)}:
            field, value = f"{field}.function", function
        case {"type": "function"}:
            value = {name: each for name, each in value.items() if name != "type"}
        case {"type": "custom"}:
            raise InvalidTask(f"{field}.type: custom tools are not supported, only functions")
        case {"type": str(kind)}:
            raise InvalidTask(f"{field}.type: {kind[:40]!r}: {_BUILT_IN}")
        case {"name": str()}:  # without a type, as `functions` and the ledger have it
            pass
        case _:
            raise InvalidTask(f"{field}: an object with type 'function' is required")
    given = {name: each for name, each in value.items() if each is not None and name not in _UNUSED}
    if unknown := set(given) - set(Tool.model_fields):
        raise InvalidTask(f"{field}.{min(unknown)}: not a field of a function")
    _check_name(given.get("name"), f"{field}.name")
    for name, form, said in _FORMS:
        if name in given and not isinstance(given[name], form):
            raise InvalidTask(f"{field}.{name}: {said} is required")
    return given


def _check_name(name: Any, field: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidTask(f"{field}: a name of at most 128 letters, digits and _-./: is required")
    return name


def choice(value: Any, offered: list[dict[str, Any]], field: str = "tool_choice") -> dict[str, Any]:
    """A task's `tool_choice`, and its `allowed_tools` where not all are. Raises InvalidTask."""
    match value:
        case "auto" | "none" | "required":
            chosen: dict[str, Any] = {"tool_choice": value}
        case {"type": "function", "function": {"name": name}} | {"type": "function", "name": name} | {"name": name}:
            chosen = {"tool_choice": "required", "allowed_tools": [name]}
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(allowed)}} | {
            "type": "allowed_tools",
            "mode": mode,
            "tools": list(allowed),
        }:
            if mode not in ("auto", "required"):
                raise InvalidTask(f"{field}: the mode of allowed tools is 'auto' or 'required'")
            if not allowed:
                raise InvalidTask(f"{field}: no tool is allowed; give 'none' instead")
            chosen = {"tool_choice": mode, "allowed_tools": [_allowed(each, field) for each in allowed]}
        case {"type": "function" | "allowed_tools"}:
            raise InvalidTask(f"{field}: name the function, or give 'mode' and 'tools'")
        case {"type": str(kind)}:
            raise InvalidTask(f"{field}: {kind[:40]!r}: only functions can be chosen")
        case _:
            raise InvalidTask(f"{field}: give {', '.join(_CHOICES)}, a function, or allowed_tools")
    names = {tool["name"] for tool in offered}
    for name in chosen.get("allowed_tools", ()):
        if not isinstance(name, str) or name not in names:
            raise InvalidTask(f"{field}: 'tools' has none named {str(name)[:80]!r}")
    if chosen["tool_choice"] == "required" and not offered:
        raise InvalidTask(f"{field}: 'required' needs 'tools'")
    return chosen


def _allowed(value: Any, field: str) -> Any:
    match value:
        case {"type": "function", "function": {"name": name}} | {"type": "function", "name": name}:
            return name
    raise InvalidTask(f"{field}: only functions can be allowed")


def calls(value: Any, field: str) -> list[dict[str, Any]]:
    """The calls of an assistant's turn. Raises InvalidTask."""
    if not isinstance(value, list):
        raise InvalidTask(f"{field}: a list of calls is required")
    if len(value) > MAX_TOOLS:
        raise InvalidTask(f"{field}: {len(value)} calls; the limit is {MAX_TOOLS}")
    return [_call(each, f"{field}.{number}") for number, each in enumerate(value)]


def _call(value: Any, field: str) -> dict[str, Any]:
    match value:
        case {"id": identity, "function": {"name": name, **function}} if value.get("type", "function") == "function":
            return call(identity, name, function.get("arguments"), field, f"{field}.function")
        case {"id": identity, "name": name} if "type" not in value:  # as the ledger has it
            return call(identity, name, value.get("arguments"), field, field)
        case {"type": str(kind)} if kind != "function":
            raise InvalidTask(f"{field}.type: {kind[:40]!r}: only calls of functions are supported")
    raise InvalidTask(f"{field}: an 'id' and a 'function' with a name and arguments are required")


def call(identity: Any, name: Any, arguments: Any, field: str, inner: str, id_field: str = "id") -> dict[str, Any]:
    """One call. Raises InvalidTask, which names its id as within `field`, what the function has as within `inner`."""
    if not isinstance(identity, str) or not 0 < len(identity) <= 128:
        raise InvalidTask(f"{field}.{id_field}: a string of at most 128 characters is required")
    _check_name(name, f"{inner}.name")
    if arguments is not None and not isinstance(arguments, str):
        raise InvalidTask(f"{inner}.arguments: a string is required: the JSON of an object")
    return {"id": identity, "name": name, "arguments": arguments or "{}"}


# --- answers


def chat_call(call: ToolCall) -> dict[str, Any]:
    """A call as a chat's message has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def response_tools(spec: TaskSpec) -> list[dict[str, Any]]:
    """A task's tools as a response repeats them."""
    return [{"type": "function", **tool.model_dump()} for tool in spec.tools]


def response_choice(spec: TaskSpec) -> str | Mapping[str, Any]:
    """A task's choice among its tools as a response repeats it."""
    if not spec.allowed_tools:
        return spec.tool_choice
    named = [{"type": "function", "name": name} for name in spec.allowed_tools]
    if spec.tool_choice == "required" and len(named) == 1:
        return named[0]
    return {"type": "allowed_tools", "mode": spec.tool_choice, "tools": named}
