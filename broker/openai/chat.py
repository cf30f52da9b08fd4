"""Chat completions, both ways.

Source: OpenAI API reference, "Chat Completions" and "Chat Completions, streaming". `reasoning_content` is the name that
vLLM, llama.cpp and others have for what the model thought.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Choice, Delta, Result, TaskSpec
from perllm.broker.openai import tools
from perllm.broker.openai.receipts import finish_reason, receipt_fields, usage
from perllm.broker.openai.requests import ChatRequest, given
from perllm.broker.openai.sampling import ANY_MODEL, shared
from perllm.broker.openai.streams import Sent
from perllm.broker.openai.turns import turns

#: Kept with a task whose request offered `functions`: they are called by `function_call`.
OLDER_FORM = {"functions": True}
_OWN = ("messages", "max_completion_tokens", "logprobs", "top_logprobs", "functions", "function_call")


def fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """A TaskSpec's fields from a request's body. Raises InvalidTask."""
    asked = given(ChatRequest, body)
    made = shared({name: value for name, value in asked.items() if name not in _OWN})
    if "messages" not in asked:
        raise InvalidTask("messages: this field is required")
    made["messages"] = turns(asked["messages"])
    if "max_completion_tokens" in asked:
        made["max_tokens"] = asked["max_completion_tokens"]
    made.update(_logprobs(asked))
    if "functions" in asked or "function_call" in asked:
        made.update(_functions(asked))
    return made


def _logprobs(asked: Mapping[str, Any]) -> dict[str, Any]:
    wanted, most = asked.get("logprobs"), asked.get("top_logprobs")
    if wanted is False:
        return {}
    if wanted is None or wanted is True:
        return {} if wanted is most is None else {"logprobs": most or 0 if isinstance(most, int | None) else most}
    return {"logprobs": wanted}  # how many, as completions have it


def _functions(asked: Mapping[str, Any]) -> dict[str, Any]:
    if "tools" in asked or "tool_choice" in asked:
        raise InvalidTask("functions: give 'tools' and 'tool_choice', or 'functions' and 'function_call'")
    offered = tools.tools(asked.get("functions", []), "functions")
    chosen = {}
    if "function_call" in asked:
        chosen = tools.choice(asked["function_call"], offered, "function_call")
    return {"tools": offered, **chosen, "parallel_tool_calls": False, "request": OLDER_FORM}


# --- answers


def body(result: Result, spec: TaskSpec, submitted: float) -> dict[str, Any]:
    """A succeeded task as a chat completion. `submitted` is in s since the epoch."""
    assert result.receipt is not None
    assert result.output is not None
    return {
        "id": result.id,
        "object": "chat.completion",
        "created": int(submitted),
        "model": result.receipt.model,
        "choices": [_choice(index, choice, spec) for index, choice in enumerate(result.output.choices)],
        "usage": usage([result]),
        **receipt_fields(result),
    }


def _choice(index: int, choice: Choice, spec: TaskSpec) -> dict[str, Any]:
    said = choice.text if choice.text or not choice.tool_calls else None
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None, "annotations": []}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls and _is_older(spec):
        message["function_call"] = tools.chat_call(choice.tool_calls[0])["function"]
    elif choice.tool_calls:
        message["tool_calls"] = [tools.chat_call(call) for call in choice.tool_calls]
    return {"index": index, "finish_reason": _reason(choice, spec), "message": message, "logprobs": _content(choice)}


def _content(choice: Choice) -> dict[str, Any] | None:
    return None if choice.logprobs is None else {"content": choice.logprobs, "refusal": None}


def _is_older(spec: TaskSpec) -> bool:
    return bool(spec.request.get("functions"))


def _reason(choice: Choice, spec: TaskSpec) -> str:
    reason = finish_reason(choice)
    return "function_call" if reason == "tool_calls" and _is_older(spec) else reason


class ChatStream:
    """The chunks of one chat completion: `opening`, then those of each `piece`, then those of the `end`."""

    def __init__(self, task_id: str, spec: TaskSpec, submitted: float, *, with_usage: bool = False) -> None:
        self._spec, self._with_usage, self._sent = spec, with_usage, Sent()
        self._common: dict[str, Any] = {
            "id": task_id,
            "object": "chat.completion.chunk",
            "created": int(submitted),
            "model": spec.model or ANY_MODEL,
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        """Who speaks, of every choice, in order: clients learn from it how many there are."""
        for index in range(self._spec.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """A piece of an answer."""
        if self._sent.add(delta) and (said := self._delta(delta)):
            yield self._chunk(delta.index, said)

    def end(self, result: Result) -> Iterator[dict[str, Any]] | None:
        """What is left of a succeeded task, and how it ended; None where its answer is not what was sent."""
        assert result.output is not None
        rest = self._sent.rest(result.output.choices)
        return None if rest is None else self._closing(rest, result)

    def _closing(self, rest: list[Delta], result: Result) -> Iterator[dict[str, Any]]:
        assert result.receipt is not None
        assert result.output is not None
        for delta in rest:
            if said := self._delta(delta):
                yield self._chunk(delta.index, said)
        self._common["model"] = result.receipt.model
        choices = result.output.choices
        for index, choice in enumerate(choices):
            last = receipt_fields(result) if index == len(choices) - 1 else {}
            yield {**self._chunk(index, {}, _reason(choice, self._spec), _content(choice)), **last}
        if self._with_usage:
            yield {**self._common, "choices": [], "usage": usage([result])}

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if delta.call is None:
            return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.text}
        function: dict[str, Any] = {"arguments": delta.arguments}
        if delta.name is not None:
            function = {"name": delta.name, **function}
        if _is_older(self._spec):
            return {"function_call": function} if delta.call == 0 else {}
        head = {} if delta.id is None else {"id": delta.id, "type": "function"}
        return {"tool_calls": [{"index": delta.call, **head, "function": function}]}

    def _chunk(
        self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        usage = {"usage": None} if self._with_usage else {}
        return {**self._common, "choices": [choice], **usage}
