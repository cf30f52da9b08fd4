"""The turns of a chat, from OpenAI's form: `developer` is the system, `function` a tool, and content given in parts is
joined.

Source: OpenAI API reference, "Chat Completions", messages. `reasoning_content` is the name vLLM, llama.cpp and others
have for what an assistant thought.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.openai import tools

_ROLES = {"developer": "system", "function": "tool"}
#: What an answer has that is no part of a turn when it comes back.
_UNUSED = frozenset((
    "type", "id", "status", "phase", "annotations", "parsed", "refusal", "object", "provider_specific_fields",
))  # fmt: skip
_TURN = frozenset((
    "role", "content", "name", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "function_call",
))  # fmt: skip
#: What parts of a content are refused, and why: here is the place for the first that is not text.
_NOT_TEXT = {
    "image_url": "images are not supported",
    "input_image": "images are not supported",
    "image": "images are not supported",
    "video_url": "videos are not supported",
    "input_audio": "audio is not supported: send a transcript as text",
    "audio_url": "audio is not supported: send a transcript as text",
    "file": "files are not supported: send their text",
    "input_file": "files are not supported: send their text",
    "computer_screenshot": "images are not supported",
}


def turns(value: Any, field: str = "messages") -> list[dict[str, Any]]:
    """A task's messages. Raises InvalidTask."""
    if not isinstance(value, list):
        raise InvalidTask(f"{field}: a list of messages is required")
    made: list[dict[str, Any]] = []
    for number, each in enumerate(value):
        made.append(turn(each, f"{field}.{number}", made[-1] if made else {}))
    check_answers(made, field)
    return made


def turn(value: Any, field: str, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One message; an older `function` turn answers the call of the turn `before` it. Raises InvalidTask."""
    if not isinstance(value, dict) or value.get("type", "message") != "message":
        raise InvalidTask(f"{field}: a message with a role and a content is required")
    given = {name: each for name, each in value.items() if each is not None}
    if given.get("audio"):
        raise InvalidTask(f"{field}.audio: audio is not supported: send a transcript as text")
    if unknown := set(given) - _TURN - _UNUSED - {"audio"}:
        raise InvalidTask(f"{field}.{min(unknown)}: not a field of a message")
    role = given.get("role")
    if not isinstance(role, str):
        raise InvalidTask(f"{field}.role: system, developer, user, assistant or tool is required")
    made: dict[str, Any] = {"role": _ROLES.get(role, role)}
    if (content := given.get("content", given.get("refusal"))) is not None:
        made["content"] = text(content, f"{field}.content")
    if (called := _calls(given, field)) is not None:
        made["tool_calls"] = called
    if (reasoning := given.get("reasoning_content", given.get("reasoning"))) is not None:
        made["reasoning"] = text(reasoning, f"{field}.reasoning_content")
    if made["role"] == "tool":
        made["tool_call_id"] = _answered(given, field, before or {})
    made.update((name, given[name]) for name in ("name", "tool_call_id") if name in given)
    if "content" not in made and not called:
        if made["role"] != "assistant" or "reasoning" not in made:
            raise InvalidTask(f"{field}.content: this field is required")
        made["content"] = ""  # it thought, and said nothing
    return made


def text(content: Any, field: str) -> str:
    """A content's text. Raises InvalidTask for a part that is none."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidTask(f"{field}: a string or a list of parts is required")
    return "".join(_part(part, f"{field}.{number}") for number, part in enumerate(content))


def _part(part: Any, field: str) -> str:
    match part:
        case {"type": "text" | "input_text" | "output_text" | "summary_text" | "reasoning_text", "text": str(said)}:
            return said
        case {"type": "refusal", "refusal": str(said)}:
            return said
        case {"type": str(kind)} if kind in _NOT_TEXT:
            raise InvalidTask(f"{field}: {_NOT_TEXT[kind]}")
    raise InvalidTask(f"{field}: a part with type 'text' and a text is required")


def _calls(given: Mapping[str, Any], field: str) -> list[dict[str, Any]] | None:
    if "function_call" in given and not given.get("tool_calls"):
        older = given["function_call"]
        if not isinstance(older, dict):
            raise InvalidTask(f"{field}.function_call: a name and arguments are required")
        name, arguments = older.get("name"), older.get("arguments")
        return [tools.call(f"call_{name}"[:128], name, arguments, field, f"{field}.function_call")]
    if "tool_calls" not in given:
        return None
    return tools.calls(given["tool_calls"], f"{field}.tool_calls")


def _answered(given: Mapping[str, Any], field: str, before: Mapping[str, Any]) -> str:
    """The id of the call this turn answers."""
    identity = given.get("tool_call_id")
    if identity is None and given.get("role") == "function":
        if not before.get("tool_calls"):
            raise InvalidTask(f"{field}: a function's answer follows its call")
        return str(before["tool_calls"][0]["id"])
    if not isinstance(identity, str):
        raise InvalidTask(f"{field}.tool_call_id: the id of the call it answers is required")
    return identity


def check_answers(made: list[dict[str, Any]], field: str) -> None:
    """Raises InvalidTask for a tool's turn that answers no call before it: no template can render that."""
    called: set[str] = set()
    for number, each in enumerate(made):
        called.update(call["id"] for call in each.get("tool_calls") or ())
        if each["role"] == "tool" and each.get("tool_call_id") not in called:
            identity = str(each.get("tool_call_id"))[:80]
            raise InvalidTask(f"{field}.{number}: there is no call {identity!r} before it that it answers")
