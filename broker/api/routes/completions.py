"""`/v1/chat/completions` and `/v1/completions`: they wait, or stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from perllm.broker.api import sse
from perllm.broker.api.callers import Caller
from perllm.broker.api.dependencies import HeaderFields, TheApi, TheCaller
from perllm.broker.api.errors import ApiError, error_body
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import ChatCompletion, Completion
from perllm.broker.api.request_body import flag, read_json
from perllm.broker.api.state import Api
from perllm.broker.api.submission import Accepted
from perllm.broker.api.waiting import with_heartbeats
from perllm.broker.errors import PerLLMError
from perllm.broker.messages import Result, State
from perllm.broker.openai.requests import ChatRequest, CompletionRequest
from perllm.broker.openai.translation import (
    ANY_MODEL,
    CHAT,
    COMPLETIONS,
    receipt_fields,
    response_body,
    task_fields,
    usage,
)

router = APIRouter(tags=["Completions"])


@router.post(
    CHAT,
    openapi_extra=takes_task(ChatRequest, plain=examples.CHAT_REQUEST),
    responses=answers(ChatCompletion, examples.CHAT, 404, 408, 413, 422, events=examples.CHAT_STREAM),
)
async def chat_completion(request: Request, api: TheApi, caller: TheCaller, headers: HeaderFields) -> Response:
    """Complete a chat. When the client goes away before the end, the task is cancelled, unless it has an idempotency
    key."""
    return await _complete(CHAT, request, api, caller, headers)


@router.post(
    COMPLETIONS,
    openapi_extra=takes_task(CompletionRequest, plain=examples.COMPLETION_REQUEST),
    responses=answers(Completion, examples.COMPLETION, 404, 408, 413, 422, events=examples.COMPLETION_STREAM),
)
async def completion(request: Request, api: TheApi, caller: TheCaller, headers: HeaderFields) -> Response:
    """Complete a prompt, which becomes one user turn of the model's chat template."""
    return await _complete(COMPLETIONS, request, api, caller, headers)


async def _complete(url: str, request: Request, api: Api, caller: Caller, headers: dict[str, Any]) -> Response:
    body = await read_json(request)
    stream = flag(body, "stream")
    required = "messages" if url == CHAT else "prompt"
    if body.get(required) is None:
        raise ApiError(400, f"{required}: this field is required", param=required)
    if body.get("prompt" if url == CHAT else "messages") is not None:
        wrong = "prompt" if url == CHAT else "messages"
        raise ApiError(400, f"{wrong}: not a field of this request", param=wrong)
    with_usage = _with_usage(body) if stream else False
    spec = await api.tasks.accept(caller, {**headers, **task_fields(body, url), "stream": stream})
    with api.waits.slot(caller) as slot:
        (accepted,) = await api.tasks.submit(caller, [spec])
        if stream:
            return sse.answer(_events(url, api, accepted, with_usage), slot.pop_all())
        result = await api.results.wait(accepted, request)
    if result.state is not State.SUCCEEDED:
        raise no_result(result)
    return JSONResponse(response_body(url, result, accepted.spec, accepted.submitted))


def _with_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options: an object is required", param="stream_options")
    return flag(options, "include_usage")


def no_result(result: Result) -> ApiError:
    """For a task that ended without an answer. No client is to try it again by itself."""
    return ApiError(
        422,
        f"the task {result.state}: {result.reason or 'no reason given'}",
        code=f"task_{result.state}",
        headers={"X-Should-Retry": "false"},
        more={"task_id": result.id, "partial": result.text or None},
    )


async def _events(url: str, api: Api, accepted: Accepted, with_usage: bool) -> AsyncIterator[str]:
    spec = accepted.spec
    common: dict[str, Any] = {
        "id": accepted.id,
        "object": "chat.completion.chunk" if url == CHAT else "text_completion",
        "created": int(accepted.submitted),
        "model": spec.model or ANY_MODEL,
    }

    def chunk(text: str | None, finish: str | None = None, **more: Any) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if url == CHAT:
            choice["delta"] = {} if text is None else {"content": text}
        else:
            choice["text"] = text or ""
        return sse.event({**common, "choices": [choice], **more})

    done = False
    try:
        if url == CHAT:
            first = {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}
            yield sse.event({**common, "choices": [first]})
        sent = ""
        async for piece in with_heartbeats(api.client.stream(accepted.id), api.stopping):
            if piece is None:
                yield sse.HEARTBEAT
            elif isinstance(piece, str):
                sent += piece
                if piece:
                    yield chunk(piece)
            else:
                done = True
                if (failure := stream_error(piece, sent)) is not None:
                    yield sse.event(failure)
                    return
                assert piece.output is not None
                assert piece.receipt is not None
                if rest := piece.text[len(sent) :]:
                    yield chunk(rest)
                common["model"] = piece.receipt.model
                yield chunk(None, piece.output.finish_reason, **receipt_fields(piece))
                if with_usage:
                    yield sse.event({**common, "choices": [], "usage": usage(piece)})
        yield sse.DONE
    except PerLLMError as error:  # too late for a status
        done = True
        yield sse.event(error_body(503, f"the stream ends here: {error}", code="unavailable", task_id=accepted.id))
    finally:
        if not done:
            api.results.abandon(accepted)


def stream_error(result: Result, sent: str) -> dict[str, Any] | None:
    """The error a stream ends with, where it does: the task ended without an answer, or the answer is not what was
    streamed (an attempt was lost half-way, and the next one sent something else)."""
    if result.state is not State.SUCCEEDED:
        error = no_result(result)
        return error_body(422, str(error.detail), code=error.code, **error.more)
    if not result.text.startswith(sent):
        message = f"a node was lost and the text began anew: GET /v1/tasks/{result.id} has it whole"
        return error_body(422, message, code="restarted", task_id=result.id)
    return None
