"""Embeddings and reranking by a remote server: whether it has them, and a request of some inputs at a time.

Source: OpenAI API reference, "Embeddings"; Jina AI API reference, "Reranker" (vLLM's and llama.cpp's servers have it).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from perllm.broker.capabilities import Capability
from perllm.broker.engine.embedding import Vector
from perllm.broker.messages import TaskSpec
from perllm.broker.vectors import unpack
from perllm.cloud_worker.openai_api import Malformed, ServerError

#: Inputs of one request, at most.
MOST_INPUTS = 128
#: Token ids any vocabulary has, for the probe.
_TOKENS = [5, 6, 7]

#: Posts a body (less the model) to a path of the API and gives the answer's JSON. Raises ServerError.
Post = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Pooling(NamedTuple):
    """What a server showed: whether it embeds (and how wide its vectors are), takes token ids, reranks."""

    capabilities: tuple[Capability, ...]
    width: int | None


class Pooled(NamedTuple):
    """What came of some inputs: of each its vector, or its score in one of one number; tokens, 0 where not told."""

    vectors: list[Vector]
    tokens: int


class _Tolerant(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Usage(_Tolerant):
    prompt_tokens: int = 0
    total_tokens: int = 0


class _Embedding(_Tolerant):
    index: int
    embedding: str | list[float]


class _Embeddings(_Tolerant):
    data: list[_Embedding]
    usage: _Usage | None = None


class _Rank(_Tolerant):
    index: int
    relevance_score: float


class _Ranking(_Tolerant):
    results: list[_Rank]
    usage: _Usage | None = None


async def look(post: Post) -> Pooling:
    """Find out by asking: each capability by a tiny request, whose answer must show it."""
    found, width = [], None
    if (embedded := await _tried(post, TaskSpec(kind="embed", inputs=("a",)), ["a"])) is not None:
        found.append(Capability.EMBEDDINGS)
        width = len(embedded.vectors[0])
        ids = await _tried(post, TaskSpec(kind="embed", input_ids=(tuple(_TOKENS),)), [_TOKENS])
        if ids is not None and ids.tokens in (len(_TOKENS), len(_TOKENS) + 1):  # not their numbers' text
            found.append(Capability.TOKENS)
    pair = TaskSpec(kind="rerank", query="a", inputs=("a", "b"))
    if await _tried(post, pair, pair.inputs) is not None:
        found.append(Capability.RERANK)
    return Pooling(tuple(sorted(found)), width)


async def _tried(post: Post, spec: TaskSpec, inputs: Sequence[Any]) -> Pooled | None:
    try:
        return await pool(post, spec, inputs)
    except ServerError:
        return None


async def pool(post: Post, spec: TaskSpec, inputs: Sequence[Any]) -> Pooled:
    """One request for some of a task's inputs. Raises ServerError, Malformed also where an input has no answer."""
    try:
        if spec.kind == "rerank":
            ranking = _Ranking.model_validate(
                await post("rerank", {"query": spec.query, "documents": list(inputs), "top_n": len(inputs)})
            )
            given = {one.index: np.array([one.relevance_score], np.float32) for one in ranking.results}
            usage = ranking.usage
        else:
            answer = _Embeddings.model_validate(await post("embeddings", {"input": list(inputs)}))
            given = {one.index: _numbers(one.embedding) for one in answer.data}
            usage = answer.usage
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise Malformed(f"its answer is none: {where}: {first['msg']}") from None
    if sorted(given) != list(range(len(inputs))) or len({len(vector) for vector in given.values()}) != 1:
        raise Malformed(f"it answered {len(given)} of {len(inputs)} inputs, or with vectors of several lengths")
    tokens = usage.prompt_tokens or usage.total_tokens if usage is not None else 0
    return Pooled([given[number] for number in range(len(inputs))], tokens)


def _numbers(embedding: str | list[float]) -> Vector:
    try:
        vector = np.asarray(unpack(embedding) if isinstance(embedding, str) else embedding, np.float32)
    except ValueError as error:
        raise Malformed(f"a vector of its is none: {error}") from None
    if not len(vector):
        raise Malformed("a vector of its is empty")
    return vector
