"""Responses, both ways.

Source: OpenAI API reference, "Responses" and "Responses, streaming events". What a response repeats of its request, and
no task needs, is kept with the task (`TaskSpec.request`), so that it can be retrieved as it was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Delta, Message, Result, State, TaskSpec, ToolCall
from perllm.broker.openai import items, tools
from perllm.broker.openai.receipts import receipt_fields
from perllm.broker.openai.requests import ResponseRequest, given
from perllm.broker.openai.sampling import ANY_MODEL, effort, output_format, shared
from perllm.broker.openai.streams import Sent

_OWN = (
    "input", "instructions", "max_output_tokens", "top_logprobs", "previous_response_id", "text", "reasoning",
    "include", "n", "truncation", "context_management",
)  # fmt: skip
#: What may be included: log probabilities, and what belongs to items that never occur here.
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = frozenset((
    _LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
))  # fmt: skip
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
        "status": _status(state, result),
        "background": bool(kept.get("background")),
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
        body.update(_outcome(result, body["status"]))
        body["completed_at"] = int(submitted + result.latency) if body["status"] == "completed" else None
    return body


def _shown_format(spec: TaskSpec) -> dict[str, Any]:
    if spec.json_schema is None:
        return {"type": "text"}
    if spec.request.get("json_object"):
        return {"type": "json_object"}
    name, strict = spec.request.get("schema_name", "schema"), bool(spec.request.get("schema_strict"))
    return {"type": "json_schema", "name": name, "schema": spec.json_schema, "strict": strict, "description": None}


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
        body["output"] = items.output_items(result.id, result.output, item_status(status))
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


def item_status(status: str) -> str:
    """The status of a final response's items."""
    return "completed" if status == "completed" else "incomplete"


# --- events


class ResponseStream:
    """The events of one response: `opening`, then those of each `piece`, then those of the `end`. The same pieces and
    the same end give the same events with the same numbers.

    Items come in the order in which their first pieces do. Reasoning is done when something else begins, a call when
    another one does; the message stays open to the end, as its text may go on after a call.
    """

    def __init__(self, task_id: str, spec: TaskSpec, submitted: float) -> None:
        self._id, self._spec, self._submitted = task_id, spec, submitted
        self._sent, self._number = Sent(), 0
        self._open: dict[str, _Item] = {}  # by what they are of
        self._items: list[_Item] = []

    def opening(self) -> Iterator[dict[str, Any]]:
        """That there is a response."""
        yield self._event("response.created", response=self._in_state(State.PENDING))
        yield self._event("response.in_progress", response=self._in_state(State.RUNNING))

    def piece(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A piece of the answer."""
        if self._sent.add(delta) and delta.index == 0:
            yield from self._said(delta)

    def end(self, result: Result) -> Iterator[dict[str, Any]]:
        """What is left, and how it ended."""
        final = self._in_state(result.state, result)
        if result.output is not None:
            rest = self._sent.rest(result.output.choices)
            if rest is None:
                message = "a node was lost and the answer began anew: retrieve the response to have it whole"
                yield self._event("error", code="restarted", message=message, param=None)
            else:
                for delta in rest:
                    yield from self._said(delta)
                if not self._items:
                    yield from self._item("message")
                done = {item["id"]: item for item in final["output"]}
                for item in list(self._open.values()):
                    yield from self._done(item, done.get(item.id))
                order = {item.id: place for place, item in enumerate(self._items)}
                final["output"].sort(key=lambda item: order.get(item["id"], len(order)))
        kind = {"completed": "completed", "failed": "failed"}.get(final["status"], "incomplete")
        yield self._event(f"response.{kind}", response=final)

    def _in_state(self, state: State, result: Result | None = None) -> dict[str, Any]:
        return response_object(self._id, self._spec, self._submitted, state, result)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}

    def _said(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.call is not None:
            yield from self._item(f"call {delta.call}", delta)
            piece = delta.arguments
        else:
            yield from self._item("reasoning" if delta.reasoning else "message")
            piece = delta.reasoning or delta.text
        item = self._open.get(_what(delta))
        if item is not None and piece:  # None: more reasoning than was taken for all of it; the end has it
            item.said.append(piece)
            more: dict[str, Any] = {"logprobs": []} if item.kind == "message" else {}
            yield self._event(f"response.{_EVENTS[item.kind]}.delta", **item.where, delta=piece, **more)

    def _item(self, what: str, delta: Delta | None = None) -> Iterator[dict[str, Any]]:
        """Have what is said be of this item: begin it, and end those that it follows."""
        if any(item.what == what for item in self._items):
            return
        for item in list(self._open.values()):
            if item.kind != "message":
                yield from self._done(item)
        item = _Item(what, self._id, len(self._items), delta)
        self._items.append(item)
        self._open[what] = item
        yield self._event(
            "response.output_item.added", output_index=item.index, item=item.shown("in_progress", empty=True)
        )
        if item.kind != "call":
            yield self._event("response.content_part.added", **item.where, part=item.part(""))

    def _done(self, item: _Item, final: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        del self._open[item.what]
        whole = final or item.shown("completed")
        if item.kind == "call":
            arguments = {"name": whole["name"], "arguments": whole["arguments"]}
            yield self._event("response.function_call_arguments.done", **item.where, **arguments)
        else:
            part = whole["content"][0]
            more = {"logprobs": part["logprobs"]} if item.kind == "message" else {}
            yield self._event(f"response.{_EVENTS[item.kind]}.done", **item.where, text=part["text"], **more)
            yield self._event("response.content_part.done", **item.where, part=part)
        yield self._event("response.output_item.done", output_index=item.index, item=dict(whole))


_EVENTS = {"message": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


def _what(delta: Delta) -> str:
    return f"call {delta.call}" if delta.call is not None else "reasoning" if delta.reasoning else "message"


class _Item:
    """An item while it is streamed."""

    def __init__(self, what: str, task_id: str, index: int, delta: Delta | None) -> None:
        self.what, self.index, self._task_id = what, index, task_id
        self.kind, _, number = what.partition(" ")
        self._number = int(number or 0)
        self._call = (delta.id or "", delta.name or "") if delta is not None else ("", "")
        self.said: list[str] = []
        self.id: str = self.shown("in_progress")["id"]
        self.where: dict[str, Any] = {"item_id": self.id, "output_index": index}
        if self.kind != "call":
            self.where["content_index"] = 0

    def part(self, text: str) -> dict[str, Any]:
        """Its one part, with this text."""
        part: dict[str, Any] = self._made(text, "in_progress")["content"][0]
        return part

    def shown(self, status: str, *, empty: bool = False) -> dict[str, Any]:
        """The item with what was said of it, or `empty`: before anything was."""
        made = self._made("".join(self.said), status)
        return {**made, "content": []} if empty and self.kind != "call" else made

    def _made(self, text: str, status: str) -> dict[str, Any]:
        match self.kind:
            case "message":
                return items.message_item(self._task_id, text, status)
            case "reasoning":
                return items.reasoning_item(self._task_id, text, status)
        identity, name = self._call
        call = ToolCall.model_construct(id=identity, name=name, arguments=text)
        return items.call_item(self._task_id, self._number, call, status)
