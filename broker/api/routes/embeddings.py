"""`/v1/embeddings` and `/v1/rerank`: they wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from perllm.broker.api.callers import Caller
from perllm.broker.api.dependencies import TheApi, TheCaller, header_fields
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import Embeddings, Reranking
from perllm.broker.api.request_body import read_json
from perllm.broker.api.routes.completions import no_result
from perllm.broker.api.state import Api
from perllm.broker.errors import InvalidTask
from perllm.broker.messages import State
from perllm.broker.openai.embeddings import EMBEDDINGS, RERANK, form, in_their_words
from perllm.broker.openai.requests import EmbeddingsRequest, RerankRequest
from perllm.broker.openai.translation import response_pieces, task_fields

router = APIRouter(tags=["Embeddings"])


@router.post(
    EMBEDDINGS,
    openapi_extra=takes_task(EmbeddingsRequest, plain=examples.EMBEDDINGS_REQUEST),
    responses=answers(Embeddings, examples.EMBEDDINGS, 404, 408, 413, 422),
)
async def embeddings(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Embed up to 2,048 inputs, each vector of length 1. When the client goes away before the end, the task is
    cancelled, unless it has an idempotency key."""
    headers = header_fields(request)
    return await _answer(EMBEDDINGS, request, api, caller, headers)


@router.post(
    RERANK,
    openapi_extra=takes_task(RerankRequest, plain=examples.RERANK_REQUEST),
    responses=answers(Reranking, examples.RERANKING, 404, 408, 413, 422),
)
async def rerank(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Order documents by how well they answer a query, best first."""
    headers = header_fields(request)
    return await _answer(RERANK, request, api, caller, headers)


async def _answer(url: str, request: Request, api: Api, caller: Caller, headers: dict[str, Any]) -> Response:
    body = await read_json(request)
    answer_form = form(body, url)
    try:
        spec = await api.tasks.accept(caller, {**headers, **task_fields(body, url)})
    except InvalidTask as error:
        raise type(error)(in_their_words(str(error), url)) from None
    with api.waits.slot(caller) as slot:
        slot.enter_context(api.embeddings.slot(caller, spec.embeddings_bytes()))
        (accepted,) = await api.tasks.submit(caller, [spec])
        result = await api.results.wait(accepted, request)
        if result.state is not State.SUCCEEDED:
            raise no_result(result)
        pieces = response_pieces(url, result, accepted.spec, accepted.submitted, answer_form)
        return _Pieces(pieces, slot.pop_all())


class _Pieces(StreamingResponse):
    """JSON that is made as it is sent; others are served in between. The slot is released when it is over."""

    media_type = "application/json"

    def __init__(self, pieces: Iterator[str], slot: ExitStack) -> None:
        super().__init__(_in_turn(pieces))
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot:
            await super().__call__(scope, receive, send)


async def _in_turn(pieces: Iterator[str]) -> AsyncIterator[str]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)
