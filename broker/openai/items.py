"""The items of the Responses API, both ways: input items become the turns of a chat, an answer becomes output items.

Source: OpenAI API reference, "Responses", input and output items. One turn of an assistant is up to three kinds of
items: what it thought (`reasoning`), what it said (`message`), and its calls (`function_call`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Message, Output, ToolCall
from perllm.broker.openai import tools, turns

#: Ids of output items: their kind, their task, and which of its calls.
_ITEM_ID = re.compile(r"(?:msg|rs)_(?P<task>\S{1,255})|fc_(?P<caller>\S{1,255})_\d{1,4}")


# --- input


def input_turns(value: Any, known: Iterable[str] = (), field: str = "input") -> list[dict[str, Any]]:
    """A task's messages from an input; calls with a `known` id may be answered in it. Raises InvalidTask."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise InvalidTask(f"{field}: a string or a list of items is required")
    made: list[dict[str, Any]] = []
    called = set(known)
    goes_on = False  # whether the last turn is an assistant's that the next item may be part of
    for number, item in enumerate(value):
        where = f"{field}.{number}"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        match kind:
            case "message":
                turn = turns.turn(item, where)
                if goes_on and turn["role"] == "assistant" and "content" not in made[-1]:
                    made[-1].update(turn)
                else:
                    made.append(turn)
                goes_on = turn["role"] == "assistant"
            case "reasoning":
                if (thought := _thought(item, where)) is None:
                    continue
                if goes_on and set(made[-1]) == {"role", "reasoning"}:
                    made[-1]["reasoning"] += f"\n{thought}"
                else:
                    made.append({"role": "assistant", "reasoning": thought})
                goes_on = True
            case "function_call":
                call = tools.call(
                    item.get("call_id"), item.get("name"), item.get("arguments"), where, where, id_field="call_id"
                )
                called.add(call["id"])
                if not goes_on:
                    made.append({"role": "assistant"})
                made[-1].setdefault("tool_calls", []).append(call)
                goes_on = True
            case "function_call_output":
                made.append(_answer(item, where, called))
                goes_on = False
            case _:
                raise InvalidTask(f"{where}: {_unsupported(kind)}")
    for turn in made:
        if "content" not in turn and not turn.get("tool_calls"):
            turn["content"] = ""  # it thought, and said nothing
    return made


def _unsupported(kind: Any) -> str:
    if not isinstance(kind, str):
        return "an item with a type, or a message with a role and a content, is required"
    return f"items of type {kind[:40]!r} are not supported: built-in tools and custom ones are not"


def _thought(item: Mapping[str, Any], field: str) -> str | None:
    """A reasoning item's text; None where it is encrypted, elsewhere, and so says nothing here."""
    parts = item.get("content") or item.get("summary") or []
    return turns.text(parts, f"{field}.content") or None


def _answer(item: Mapping[str, Any], field: str, called: set[str]) -> dict[str, Any]:
    identity = item.get("call_id")
    if not isinstance(identity, str) or identity not in called:
        raise InvalidTask(f"{field}.call_id: there is no call {str(identity)[:80]!r} before it that it answers")
    if item.get("output") is None:
        raise InvalidTask(f"{field}.output: this field is required")
    return {"role": "tool", "tool_call_id": identity, "content": turns.text(item["output"], f"{field}.output")}


def answer_turn(output: Output) -> dict[str, Any]:
    """An answer as the turn after which a chat goes on."""
    turn: dict[str, Any] = {"role": "assistant", "content": output.text}
    if output.reasoning is not None:
        turn["reasoning"] = output.reasoning
    if output.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in output.tool_calls]
    return turn


def referred(value: Any, field: str = "input") -> dict[int, tuple[str, str]]:
    """The items of an input that stand for another: their place, the task whose item is meant, and its id. Raises
    InvalidTask."""
    found = {}
    for number, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict) and item.get("type") == "item_reference":
            identity = item.get("id")
            meant = _ITEM_ID.fullmatch(identity) if isinstance(identity, str) else None
            if meant is None:
                raise InvalidTask(f"{field}.{number}.id: no item {str(identity)[:80]!r}")
            found[number] = meant["task"] or meant["caller"], str(identity)
    return found


# --- output


def output_items(task_id: str, output: Output, status: str, *, summarised: bool = False) -> list[dict[str, Any]]:
    """An answer as items; `summarised`: what was thought as a summary."""
    made = []
    if output.reasoning:
        made.append((summary_item if summarised else reasoning_item)(task_id, output.reasoning, status))
    calls = [call_item(task_id, number, call, status) for number, call in enumerate(output.tool_calls)]
    if output.text or not (calls or made):
        made.append(message_item(task_id, output.text, status, output.logprobs or ()))
    return made + calls


def message_item(task_id: str, text: str, status: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What was said."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}]
    return {"type": "message", "id": f"msg_{task_id}", "status": status, "role": "assistant", "content": content}


def reasoning_item(task_id: str, text: str, status: str) -> dict[str, Any]:
    """What was thought."""
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": f"rs_{task_id}", "status": status, "summary": [], "content": content}


def summary_item(task_id: str, text: str, status: str) -> dict[str, Any]:
    """The same as a summary: it is the whole thought, as nobody makes a shorter one."""
    summary = [{"type": "summary_text", "text": text}]
    return {"type": "reasoning", "id": f"rs_{task_id}", "status": status, "summary": summary}


def call_item(task_id: str, number: int, call: ToolCall, status: str) -> dict[str, Any]:
    """A call."""
    return {
        "type": "function_call",
        "id": f"fc_{task_id}_{number}",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


def input_items(task_id: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A task's turns as the items they were, or could have been."""
    made: list[dict[str, Any]] = []
    for number, turn in enumerate(messages):
        name = f"{task_id}-in-{number}"
        if turn.role == "tool":
            made.append(
                {
                    "type": "function_call_output",
                    "id": f"fco_{name}",
                    "call_id": turn.tool_call_id,
                    "output": turn.content or "",
                    "status": "completed",
                }
            )
        elif turn.role == "assistant":
            said = Output(
                text=turn.content or "", finish_reason="stop", reasoning=turn.reasoning, tool_calls=turn.tool_calls
            )
            made += output_items(name, said, "completed")
        else:
            content = [{"type": "input_text", "text": turn.content or ""}]
            made.append(
                {"type": "message", "id": f"msg_{name}", "status": "completed", "role": turn.role, "content": content}
            )
    return made
