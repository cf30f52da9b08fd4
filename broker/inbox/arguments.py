"""What a Celery message asks for, in a task's words: its arguments, and its options `eta`, `expires` and `priority`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import MAX_DEADLINE

#: Steps of priority in which Redis keeps messages, 0 first: each halves a task's value.
PRIORITY_STEP = 3
#: What goes between several texts that become one prompt.
BETWEEN_TEXTS = "\n\n"


class Expired(InvalidTask):
    """The message came after it was to expire."""


def fields_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A task's fields: the keyword arguments and, from the one positional argument there may be, either more fields (an
    object) or text: a string, an answer of `perllm.generate`, or a list of these. That is how a chain or chord passes
    its results on. The text is the prompt, or follows the one given, or is the last turn of the messages given; of a
    task that embeds, each text is one of its inputs.

    Raises InvalidTask."""
    if not args:
        return dict(kwargs)
    if len(args) > 1:
        raise InvalidTask("send the task's fields as keyword arguments, or as one object")
    given = args[0]
    if given is None:
        return dict(kwargs)
    if isinstance(given, dict) and not _is_answer(given):
        if twice := given.keys() & kwargs.keys():
            raise InvalidTask(f"{min(twice)}: given twice, as a keyword argument and in the object beside it")
        return {**given, **kwargs}
    texts = _texts(given)
    if kwargs.get("kind") == "embed":
        return _with_inputs(kwargs, texts)
    return _with_text(kwargs, BETWEEN_TEXTS.join(texts))


def _is_answer(given: Any) -> bool:
    """Whether this is what `AsyncResult.get` returns of a task of ours."""
    return isinstance(given, dict) and isinstance(given.get("output"), dict) and "text" in given["output"]


def _texts(given: Any) -> list[str]:
    """Those in a list, and in the lists in it, in order."""
    waiting, texts = [given], []
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | tuple):
            waiting += reversed(one)
            continue
        if _is_answer(one):
            one = one["output"]["text"]
        if isinstance(one, int | float) and not isinstance(one, bool):
            one = str(one)
        if not isinstance(one, str):
            raise InvalidTask(
                "a positional argument is text, an answer of perllm.generate, a list of these, or one object with the "
                f"task's fields; not {type(one).__name__}"
            )
        texts.append(one)
    return texts


def _with_text(fields: Mapping[str, Any], text: str) -> dict[str, Any]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(messages, list | tuple):
        return {**fields, "messages": [*messages, {"role": "user", "content": text}]}
    if isinstance(prompt, str):
        return {**fields, "prompt": f"{prompt}{BETWEEN_TEXTS}{text}"}
    if prompt is None and messages is None:
        return {**fields, "prompt": text}
    return dict(fields)  # what is wrong with these is said by the check of the whole task


def _with_inputs(fields: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    inputs = fields.get("inputs", [])
    return {**fields, "inputs": [*inputs, *texts]} if isinstance(inputs, list | tuple) else dict(fields)


def with_options(
    fields: dict[str, Any], eta: str | None, expires: str | None, priority: Any, now: Callable[[], float]
) -> dict[str, Any]:
    """The fields with what the message's options say: `eta` as `start_after`, `expires` as the latest `deadline`,
    `priority` as the `value`, where none is given. `now` is the server's clock. Raises InvalidTask, Expired."""
    added: dict[str, Any] = {}
    if eta is not None or expires is not None:
        at = now()
        if eta is not None and (wait := _time("eta", eta) - at) > 0:
            added["start_after"] = wait
        if expires is not None:
            left = _time("expires", expires) - at
            if left <= 0:
                raise Expired("expired")
            given = fields.get("deadline", left)
            if isinstance(given, int | float) and given >= left:
                added["deadline"] = min(left, MAX_DEADLINE)
    if isinstance(priority, int) and priority > 0 and "value" not in fields:
        added["value"] = 0.5 ** (min(priority, 255) / PRIORITY_STEP)
    return {**fields, **added}


def _time(name: str, given: str) -> float:
    """A time as Celery writes it, ISO 8601, as seconds since the epoch; UTC where it names no zone."""
    try:
        when = datetime.fromisoformat(given)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        raise InvalidTask(
            f"{name}: must be a time as in 2026-12-01T06:00:00+00:00 (given {str(given)[:40]!r})"
        ) from None
