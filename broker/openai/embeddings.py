"""Embeddings and reranking, both ways: a request becomes a task's fields, a result becomes the parts of a response.

Source: OpenAI API reference, "Embeddings". `/v1/rerank` is as vLLM's and llama.cpp's servers have it (Jina AI API
reference, "Reranker"). A response's vectors may be tens of megabytes, so it is made in pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import MAX_INPUTS, Result, TaskSpec
from perllm.broker.openai.requests import EmbeddingsRequest, RerankRequest, given
from perllm.broker.vectors import as_json, unpack

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"

#: Fields that are a task's under the same name.
_TAKEN_OVER = ("deadline", "value", "service", "metadata", "dimensions")
#: Characters from which on what was gathered of a response is a piece of it.
_PIECE = 32_768


class AnswerForm(NamedTuple):
    """How a request is to be answered, beside the task it is."""

    encoding: Literal["float", "base64"] = "float"
    most: int | None = None  # of the results of a rerank, the best ones
    documents: bool = True  # whether they have their documents


USUAL_FORM = AnswerForm()


# --- requests


def fields(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """A TaskSpec's fields from a request's body. Raises InvalidTask naming the field that is wrong; other values are
    checked with the task."""
    asked = given(EmbeddingsRequest if url == EMBEDDINGS else RerankRequest, body)
    form(body, url)
    made: dict[str, Any] = {name: asked[name] for name in _TAKEN_OVER if name in asked}
    if asked.get("model") not in (None, "auto"):
        made["model"] = asked["model"]
    if url == EMBEDDINGS:
        return {"kind": "embed", **_inputs(asked.get("input")), **made}
    query = asked.get("query")
    if not isinstance(query, str) or not query:
        raise InvalidTask("query: a text is required")
    return {"kind": "rerank", "query": query, "inputs": _documents(asked.get("documents")), **made}


def form(body: Mapping[str, Any], url: str) -> AnswerForm:
    """How a request is to be answered. Raises InvalidTask."""
    if url == EMBEDDINGS:
        encoding = body.get("encoding_format")
        if encoding not in (None, "float", "base64"):
            raise InvalidTask("encoding_format: float or base64 is required")
        return AnswerForm(encoding=encoding or "float")
    most, documents = body.get("top_n"), body.get("return_documents")
    if most is not None and (type(most) is not int or most < 1):
        raise InvalidTask("top_n: a whole number from 1 on is required")
    if documents is not None and not isinstance(documents, bool):
        raise InvalidTask("return_documents: true or false is required")
    return AnswerForm(most=most, documents=documents is not False)


def _inputs(given: Any) -> dict[str, Any]:
    """What is to be embedded: a text, texts, the ids of a text's tokens, or of several texts'."""
    wanted = "a text, a list of texts, a list of token ids, or a list of such lists is required"
    if isinstance(given, str) or (isinstance(given, list) and given and all(type(each) is int for each in given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise InvalidTask(f"input: {wanted}")
    if len(given) > MAX_INPUTS:
        raise InvalidTask(f"input: {len(given)} inputs; the limit is {MAX_INPUTS}: send several requests, or a batch")
    kind = type(given[0])
    for number, each in enumerate(given):
        if kind not in (str, list) or type(each) is not kind:
            raise InvalidTask(f"input.{number}: {wanted}")
        if not each:
            raise InvalidTask(f"input.{number}: is empty")
        if kind is list and not all(type(token) is int and 0 <= token < 2**31 for token in each):
            raise InvalidTask(f"input.{number}: a token is a whole number from 0 on")
    return {"inputs": given} if kind is str else {"input_ids": given}


def _documents(given: Any) -> list[str]:
    if not isinstance(given, list) or not given:
        raise InvalidTask("documents: a list of texts is required")
    if len(given) > MAX_INPUTS:
        raise InvalidTask(f"documents: {len(given)} documents; the limit is {MAX_INPUTS}")
    texts = []
    for number, each in enumerate(given):
        text = each.get("text") if isinstance(each, dict) else each
        if not isinstance(text, str) or not text:
            raise InvalidTask(f"documents.{number}: a text, or an object with a 'text', is required")
        texts.append(text)
    return texts


def in_their_words(message: str, url: str) -> str:
    """What is wrong with a task, by the request's name for its inputs."""
    return re.sub(r"^(?:inputs|input_ids)\b", "input" if url == EMBEDDINGS else "documents", message)


# --- responses


def response_pieces(
    url: str, result: Result, spec: TaskSpec, form: AnswerForm, more: Mapping[str, Any]
) -> Iterator[str]:
    """The JSON of the body a succeeded task's endpoint answers with, in pieces of tens of kilobytes. `more` are fields
    beside OpenAI's."""
    assert result.receipt is not None
    tokens = result.receipt.prompt_tokens
    body: dict[str, Any] = {
        "id": result.id,
        "object": "list",
        "model": result.receipt.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        **more,
    }
    name, items = ("data", _embeddings(result, form)) if url == EMBEDDINGS else ("results", _ranked(result, spec, form))
    yield f'{json.dumps(body)[:-1]}, "{name}": ['
    gathered = next(items, "")
    for item in items:
        gathered += ", "
        if len(gathered) > _PIECE:
            yield gathered
            gathered = ""
        gathered += item
    yield gathered + "]}"


def _embeddings(result: Result, form: AnswerForm) -> Iterator[str]:
    assert result.output is not None
    for index, vector in enumerate(result.output.vectors or ()):
        numbers = f'"{vector}"' if form.encoding == "base64" else as_json(unpack(vector))
        yield f'{{"object": "embedding", "index": {index}, "embedding": {numbers}}}'


def _ranked(result: Result, spec: TaskSpec, form: AnswerForm) -> Iterator[str]:
    """The documents that answer the query best, best first."""
    assert result.output is not None
    scores = result.output.scores or ()
    for index in sorted(range(len(scores)), key=lambda i: -scores[i])[: form.most]:
        found: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if form.documents:
            found["document"] = {"text": spec.inputs[index]}
        yield json.dumps(found, ensure_ascii=False)
