"""`/v1/chat/completions` and `/v1/completions`: they wait, or stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from perllm.broker.api import sse
from perllm.broker.api.dependencies import TheApi, TheCaller, header_fields
from perllm.broker.api.errors import ApiError, error_body
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import ChatCompletion, Completion
from perllm.broker.api.request_body import flag, read_json
from perllm.broker.api.state import Api
from perllm.broker.api.submission import Accepted
from perllm.broker.api.waiting import merged, with_heartbeats
from perllm.broker.errors import PerLLMError
from perllm.broker.messages import Result, State, TaskSpec
from perllm.broker.openai import chat, completions
from perllm.broker.openai.chat import ChatStream
from perllm.broker.openai.completions import CompletionStream
from perllm.broker.openai.requests import ChatRequest, CompletionRequest
from perllm.broker.openai.translation import CHAT, COMPLETIONS

router = APIRouter(tags=["Completions"])


@router.post(
    CHAT,
    openapi_extra=takes_task(ChatRequest, plain=examples.CHAT_REQUEST, tools=examples.TOOLS_REQUEST),
    responses=answers(ChatCompletion, examples.CHAT, 404, 408, 413, 422, events=examples.CHAT_STREAM),
)
async def chat_completion(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Complete a chat. When the client goes away before the end, the task is cancelled, unless it has an idempotency
    key."""
    headers = header_fields(request)
    body = await read_json(request)
    stream, with_usage = _how(body)
    spec = await api.tasks.accept(caller, {**headers, **chat.fields(body), "stream": stream}, given=body)
    with api.waits.slot(caller) as slot:
        (accepted,) = await api.tasks.submit(caller, [spec])
        if stream:
            chunks = ChatStream(accepted.id, accepted.spec, accepted.submitted, with_usage=with_usage)
            return sse.answer(_chat_events(api, accepted, chunks), slot.pop_all())
        result = await api.results.wait(accepted, request)
    if result.state is not State.SUCCEEDED:
        raise no_result(result)
    return JSONResponse(chat.body(result, accepted.spec, accepted.submitted))


@router.post(
    COMPLETIONS,
    openapi_extra=takes_task(
        CompletionRequest, plain=examples.COMPLETION_REQUEST, several=examples.COMPLETIONS_REQUEST
    ),
    responses=answers(Completion, examples.COMPLETION, 404, 408, 413, 422, events=examples.COMPLETION_STREAM),
)
async def completion(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Complete a prompt, which becomes one user turn of the model's chat template, or several, each a task of its own.
    Several are answered together: if one has no answer, none is given."""
    headers = header_fields(request)
    body = await read_json(request)
    stream, with_usage = _how(body)
    specs: list[TaskSpec] = []
    for fields in completions.tasks(body):
        own = _own_key(headers, len(specs))
        specs.append(await api.tasks.accept(caller, {**own, **fields, "stream": stream}, given=body))
    with api.waits.slot(caller) as slot:
        accepted = await api.tasks.submit(caller, specs)
        if stream:
            chunks = CompletionStream(
                [each.id for each in accepted],
                [each.spec for each in accepted],
                accepted[0].submitted,
                with_usage=with_usage,
            )
            return sse.answer(_completion_events(api, accepted, chunks), slot.pop_all())
        results = await api.results.wait_for_all(accepted, request)
    for result in results:
        if result.state is not State.SUCCEEDED:
            raise no_result(result)
    return JSONResponse(completions.body(results, accepted[0].submitted))


def _how(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether to stream, and whether to say then how many tokens it took. Raises ApiError."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options: an object is required", param="stream_options")
    return flag(body, "stream"), flag(options, "include_usage")


def _own_key(headers: dict[str, Any], number: int) -> dict[str, Any]:
    """The fields given as headers for the prompt of that number: one idempotency key stands for one task."""
    key = headers.get("idempotency_key")
    return headers if key is None or not number else {**headers, "idempotency_key": f"{key}#{number}"}


def no_result(result: Result) -> ApiError:
    """For a task that ended without an answer. No client is to try it again by itself."""
    return ApiError(
        422,
        f"the task {result.state}: {result.reason or 'no reason given'}",
        code=f"task_{result.state}",
        headers={"X-Should-Retry": "false"},
        more={"task_id": result.id, "partial": result.text or None},
    )


async def _chat_events(api: Api, accepted: Accepted, chunks: ChatStream) -> AsyncIterator[str]:
    done = False
    try:
        yield _joined(chunks.opening())
        async for piece in with_heartbeats(api.client.deltas(accepted.id), api.stopping):
            if piece is None:
                yield sse.HEARTBEAT
            elif not isinstance(piece, Result):
                if text := _joined(chunks.piece(piece)):
                    yield text
            else:
                done = True
                if (failure := _failure(piece)) is not None or (last := chunks.end(piece)) is None:
                    yield sse.event(failure or _restarted(piece))
                    return
                yield _joined(last)
        yield sse.DONE
    except PerLLMError as error:  # too late for a status
        done = True
        yield sse.event(_unavailable(error, accepted))
    finally:
        if not done:
            api.results.abandon(accepted)


async def _completion_events(api: Api, accepted: list[Accepted], chunks: CompletionStream) -> AsyncIterator[str]:
    left = set(range(len(accepted)))
    try:
        async for item in with_heartbeats(merged([api.client.deltas(each.id) for each in accepted]), api.stopping):
            if item is None:
                yield sse.HEARTBEAT
                continue
            number, piece = item
            if not isinstance(piece, Result):
                if text := _joined(chunks.piece(number, piece)):
                    yield text
                continue
            left.discard(number)
            if (failure := _failure(piece)) is not None or (last := chunks.end(number, piece)) is None:
                yield sse.event(failure or _restarted(piece))
                return
            yield _joined(last)
        yield sse.DONE
    except PerLLMError as error:  # too late for a status
        left.clear()
        yield sse.event(_unavailable(error, accepted[0]))
    finally:
        for number in left:
            api.results.abandon(accepted[number])


def _joined(chunks: Iterable[dict[str, Any]]) -> str:
    return "".join(map(sse.event, chunks))


def _failure(result: Result) -> dict[str, Any] | None:
    """The error a stream ends with where the task ended without an answer."""
    if result.state is State.SUCCEEDED:
        return None
    error = no_result(result)
    return error_body(422, str(error.detail), code=error.code, **error.more)


def _restarted(result: Result) -> dict[str, Any]:
    """The error a stream ends with where the answer is not what was streamed: an attempt was lost half-way, and the
    next one said something else."""
    message = f"a node was lost and the answer began anew: GET /v1/tasks/{result.id} has it whole"
    return error_body(422, message, code="restarted", task_id=result.id)


def _unavailable(error: PerLLMError, accepted: Accepted) -> dict[str, Any]:
    return error_body(503, f"the stream ends here: {error}", code="unavailable", task_id=accepted.id)
