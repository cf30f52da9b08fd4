"""The OpenAI API's bodies, both ways: a request becomes a task's fields, a result becomes a response.

Beside what OpenAI's API has, a request may carry `deadline`, `value`, `service` and `expected_tokens`, and the sampling
fields of `TaskSpec`; a response carries `energy` (J by stage, the method, measured or estimated), `node`, `on_time` and
`latency` (s). The id of everything is its task's. Each endpoint has a module of its own here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Result, TaskSpec
from perllm.broker.openai import chat, completions, embeddings, responses
from perllm.broker.openai.embeddings import EMBEDDINGS, RERANK, USUAL_FORM, AnswerForm
from perllm.broker.openai.receipts import receipt_fields

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, RERANK)
#: Our fields a request may carry.
EXTENSIONS = ("deadline", "value", "service", "expected_tokens")


def task_fields(body: Mapping[str, Any], url: str = CHAT) -> dict[str, Any]:
    """A TaskSpec's fields from a request's body. Raises InvalidTask for a field that is neither OpenAI's nor ours, or
    asks for what is not supported; other values are checked with the task."""
    if url in (EMBEDDINGS, RERANK):
        return embeddings.fields(body, url)
    if url == COMPLETIONS:
        return completions.fields(body)
    return responses.fields(body) if url == RESPONSES else chat.fields(body)


def endpoint_of(body: Mapping[str, Any]) -> str:
    """Whose body this is, by what it has."""
    return COMPLETIONS if "prompt" in body else RESPONSES if "input" in body else CHAT


def response_pieces(
    url: str, result: Result, spec: TaskSpec, submitted: float, form: AnswerForm = USUAL_FORM
) -> Iterator[str]:
    """A succeeded task as the JSON its endpoint answers with, in pieces. `submitted` is in s since the epoch."""
    if url in (EMBEDDINGS, RERANK):
        return embeddings.response_pieces(url, result, spec, form, receipt_fields(result))
    return iter([json.dumps(response_body(url, result, spec, submitted), ensure_ascii=False)])


def response_body(url: str, result: Result, spec: TaskSpec, submitted: float) -> dict[str, Any]:
    """A succeeded task as the body its endpoint answers with. `submitted` is in s since the epoch."""
    if url == COMPLETIONS:
        return completions.body([result], submitted)
    if url == RESPONSES:
        return responses.response_object(result.id, spec, submitted, result.state, result)
    return chat.body(result, spec, submitted)


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
