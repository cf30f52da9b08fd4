"""Completions, OpenAI's older endpoint, both ways. Several prompts in one request are a task each.

Source: OpenAI API reference, "Completions (legacy)".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Choice, Delta, Result, TaskSpec
from perllm.broker.openai.receipts import finish_reason, receipts_fields, usage
from perllm.broker.openai.requests import MAX_PROMPTS, CompletionRequest, given
from perllm.broker.openai.sampling import ANY_MODEL, shared
from perllm.broker.openai.streams import Sent

_OWN = ("prompt", "max_completion_tokens", "logprobs", "best_of", "suffix")


def fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """A TaskSpec's fields from a request's body of one prompt. Raises InvalidTask."""
    many = tasks(body)
    if len(many) > 1:
        raise InvalidTask(f"prompt: {len(many)} prompts: give each a line of its own")
    return many[0]


def tasks(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of a TaskSpec for each prompt of a request's body. Raises InvalidTask."""
    asked = given(CompletionRequest, body)
    made = shared({name: value for name, value in asked.items() if name not in _OWN})
    if "max_completion_tokens" in asked:
        made["max_tokens"] = asked["max_completion_tokens"]
    if isinstance(wanted := asked.get("logprobs"), bool):
        wanted = 0 if wanted else None
    if wanted is not None:
        made["logprobs"] = wanted
    if asked.get("suffix"):
        made["suffix"] = asked["suffix"]
    if "best_of" in asked and asked["best_of"] != asked.get("n", 1):
        raise InvalidTask("best_of: only the same as 'n' is supported: no answers are left out")
    return [{**made, **prompt} for prompt in _prompts(asked.get("prompt"))]


def _prompts(value: Any) -> list[dict[str, Any]]:
    if value is None:
        raise InvalidTask("prompt: this field is required")
    if isinstance(value, list) and value and not all(isinstance(each, str | list) for each in value):
        return [{"prompt_ids": value}]  # token ids; which are none is said when the task is checked
    each = value if isinstance(value, list) else [value]
    if not 1 <= len(each) <= MAX_PROMPTS:
        raise InvalidTask(f"prompt: {len(each)} prompts; 1 to {MAX_PROMPTS} are possible in one request")
    return [{"prompt_ids" if isinstance(prompt, list) else "prompt": prompt} for prompt in each]


# --- answers


def body(results: Sequence[Result], submitted: float) -> dict[str, Any]:
    """Succeeded tasks, one of each prompt, as a completion. `submitted` is in s since the epoch."""
    first = results[0]
    assert first.receipt is not None
    choices = [choice for result in results if result.output is not None for choice in result.output.choices]
    return {
        "id": first.id,
        "object": "text_completion",
        "created": int(submitted),
        "model": first.receipt.model,
        "choices": [
            {"index": index, "finish_reason": _reason(choice), "text": choice.text, "logprobs": _logprobs(choice)}
            for index, choice in enumerate(choices)
        ],
        "usage": usage(results),
        **receipts_fields(results),
    }


def _reason(choice: Choice) -> str:
    reason = finish_reason(choice)
    return "stop" if reason == "tool_calls" else reason  # calls are not shown here


def _logprobs(choice: Choice) -> dict[str, Any] | None:
    if choice.logprobs is None:
        return None
    offsets, at = [], 0
    for entry in choice.logprobs:
        offsets.append(at)
        at += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in choice.logprobs],
        "token_logprobs": [entry["logprob"] for entry in choice.logprobs],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()} for entry in choice.logprobs
        ],
        "text_offset": offsets,
    }


class CompletionStream:
    """The chunks of one completion: those of each `piece` of each prompt's task, then those of the tasks' `end`."""

    def __init__(
        self, task_ids: Sequence[str], specs: Sequence[TaskSpec], submitted: float, *, with_usage: bool
    ) -> None:
        self._n, self._with_usage = specs[0].n, with_usage
        self._sent = [Sent() for _ in specs]
        self._results: list[Result] = []
        self._common: dict[str, Any] = {
            "id": task_ids[0],
            "object": "text_completion",
            "created": int(submitted),
            "model": specs[0].model or ANY_MODEL,
        }

    def piece(self, number: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """A piece of the answer to one prompt. What the model thinks, and calls, is not shown here."""
        if self._sent[number].add(delta) and delta.text:
            yield self._chunk(number * self._n + delta.index, delta.text)

    def end(self, number: int, result: Result) -> Iterator[dict[str, Any]] | None:
        """What is left of one prompt's succeeded task, and how it ended; None where its answer is not what was sent.
        After the last of them, the receipt of all."""
        assert result.output is not None
        rest = self._sent[number].rest(result.output.choices)
        return None if rest is None else self._closing(number, rest, result)

    def _closing(self, number: int, rest: list[Delta], result: Result) -> Iterator[dict[str, Any]]:
        assert result.receipt is not None
        assert result.output is not None
        self._results.append(result)
        first = number * self._n
        yield from (self._chunk(first + delta.index, delta.text) for delta in rest if delta.text)
        self._common["model"] = result.receipt.model
        choices = result.output.choices
        everything = len(self._results) == len(self._sent)
        for index, choice in enumerate(choices):
            chunk = self._chunk(first + index, "", _reason(choice), _logprobs(choice))
            last = everything and index == len(choices) - 1
            yield {**chunk, **receipts_fields(self._results)} if last else chunk
        if everything and self._with_usage:
            yield {**self._common, "choices": [], "usage": usage(self._results)}

    def _chunk(
        self, index: int, text: str, finish: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        usage = {"usage": None} if self._with_usage else {}
        return {**self._common, "choices": [choice], **usage}
