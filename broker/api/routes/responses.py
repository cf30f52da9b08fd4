"""`/v1/responses`: in the background or not, streamed or not; retrieved, streamed again, cancelled, deleted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from perllm.broker.api import sse
from perllm.broker.api.callers import Caller
from perllm.broker.api.dependencies import HeaderFields, TheApi, TheCaller
from perllm.broker.api.errors import ApiError
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import Deleted, ResponseObject
from perllm.broker.api.request_body import flag, read_json
from perllm.broker.api.state import Api
from perllm.broker.api.submission import Accepted
from perllm.broker.api.waiting import with_heartbeats
from perllm.broker.errors import InvalidTask, PerLLMError
from perllm.broker.ledger import TaskRecord
from perllm.broker.messages import Result, State
from perllm.broker.openai.requests import ResponseRequest
from perllm.broker.openai.translation import RESPONSES, message_item, response_object, task_fields

router = APIRouter(tags=["Responses"])

#: Sequence number of the first piece of text: before it come created, in_progress, and the item and part it is in.
_FIRST_PIECE = 4


@router.post(
    RESPONSES,
    openapi_extra=takes_task(ResponseRequest, plain=examples.RESPONSE_REQUEST, background=examples.BACKGROUND_REQUEST),
    responses=answers(ResponseObject, examples.RESPONSE, 404, 408, 413, 422, events=examples.RESPONSE_STREAM),
)
async def create_response(request: Request, api: TheApi, caller: TheCaller, headers: HeaderFields) -> Response:
    """Make a response. With `background`, this answers at once and it runs on its own; without, this waits, and cancels
    it when the client goes away."""
    body = await read_json(request)
    stream, background = flag(body, "stream"), flag(body, "background")
    if body.get("input") is None:
        raise ApiError(400, "input: this field is required", param="input")
    previous = body.pop("previous_response_id", None)
    fields = task_fields(body, RESPONSES)
    if previous is not None:
        fields["messages"] = await _continue(api, caller, previous, fields["messages"])
    try:
        spec = await api.tasks.accept(caller, {**headers, **fields, "stream": stream})
    except InvalidTask as error:
        raise InvalidTask(str(error).replace("max_tokens:", "max_output_tokens:")) from None
    if background and not stream:
        (accepted,) = await api.tasks.submit(caller, [spec])
        state, result = State.PENDING, None
        if accepted.repeated:
            record = await api.tasks.record(caller, accepted.id)
            state, result = record.state, record.result
    else:
        with api.waits.slot(caller) as slot:
            (accepted,) = await api.tasks.submit(caller, [spec])
            if stream:
                return sse.answer(_events(api, accepted, background=background, after=-1), slot.pop_all())
            result = await api.results.wait(accepted, request)
            state = result.state
    return JSONResponse(
        response_object(accepted.id, accepted.spec, accepted.submitted, state, result, background=background)
    )


async def _continue(api: Api, caller: Caller, previous: Any, messages: list[Any]) -> list[Any]:
    """The messages after those of an earlier response, whose instructions do not carry over."""
    if not isinstance(previous, str):
        raise ApiError(400, "previous_response_id: a string is required", param="previous_response_id")
    record = await api.tasks.record(caller, previous, "response")
    if record.result is None or record.result.output is None:
        raise ApiError(400, f"previous_response_id: {previous!r} has no output", param="previous_response_id")
    spec = record.spec
    before = [m.model_dump() for m in spec.messages or ()] or [{"role": "user", "content": spec.prompt}]
    if before[0]["role"] == "system":
        del before[0]
    system = [m for m in messages[:1] if m["role"] == "system"]
    answer = {"role": "assistant", "content": record.result.text}
    return [*system, *before, answer, *messages[len(system) :]]


@router.get(
    RESPONSES + "/{id}",
    responses=answers(ResponseObject, examples.RESPONSE, 404, events=examples.RESPONSE_STREAM),
)
async def retrieve_response(
    id: str,
    api: TheApi,
    caller: TheCaller,
    stream: Annotated[bool, Query(description="Stream it instead: its events so far, and those to come.")] = False,
    starting_after: Annotated[
        int | None, Query(ge=0, le=2**53, description="With `stream`: only events after this sequence number.")
    ] = None,
) -> Response:
    """A response as it is now, or its events. Text streams while it is generated if the response was made with
    `stream`, and at the end if not."""
    record = await api.tasks.record(caller, id, "response")
    if stream:
        after = -1 if starting_after is None else starting_after
        accepted = Accepted(id, record.spec, record.submitted)
        with api.waits.slot(caller) as slot:
            return sse.answer(_events(api, accepted, background=True, after=after), slot.pop_all())
    return JSONResponse(_response_object(record))


@router.post(RESPONSES + "/{id}/cancel", responses=answers(ResponseObject, examples.RESPONSE, 404))
async def cancel_response(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Cancel a response. One that has ended stays as it is."""
    return JSONResponse(_response_object(await api.tasks.cancel(caller, id, "response")))


@router.delete(
    RESPONSES + "/{id}", responses=answers(Deleted, {**examples.DELETED, "id": "resp-1", "object": "response"}, 404)
)
async def delete_response(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Forget a response for good. One that goes on is cancelled first."""
    await api.tasks.forget(caller, id, "response")
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def _response_object(record: TaskRecord) -> dict[str, Any]:
    return response_object(record.id, record.spec, record.submitted, record.state, record.result, background=True)


async def _events(api: Api, accepted: Accepted, *, background: bool, after: int) -> AsyncIterator[str]:
    """The events with a number above `after`. The same event has the same number whenever it is read."""
    done = False
    try:
        async for event in with_heartbeats(_numbered(api, accepted, background), api.stopping):
            if event is None:
                yield sse.HEARTBEAT
            else:
                done = event["type"] in ("response.completed", "response.incomplete", "response.failed")
                if event["sequence_number"] > after:
                    yield sse.event(event, event["type"])
    except PerLLMError as error:  # too late for a status
        done = True
        number = 2**53 - 1  # which no event of the response has
        yield sse.event(_event(number, "error", code="unavailable", message=str(error), param=None), "error")
    finally:
        if not done and not background:
            api.results.abandon(accepted)


async def _numbered(api: Api, accepted: Accepted, background: bool) -> AsyncIterator[dict[str, Any]]:
    def in_state(state: State, result: Result | None = None) -> dict[str, Any]:
        return response_object(accepted.id, accepted.spec, accepted.submitted, state, result, background=background)

    item = message_item(accepted.id, "", "in_progress")
    where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield _event(0, "response.created", response=in_state(State.PENDING))
    yield _event(1, "response.in_progress", response=in_state(State.RUNNING))
    sent, number = "", _FIRST_PIECE
    async for piece in api.client.stream(accepted.id):
        if isinstance(piece, Result):
            result = piece
            break
        if number == _FIRST_PIECE:
            for event in _opening(item, where):
                yield event
        if piece:
            yield _delta(number, where, piece)
        sent += piece
        number += 1
    else:  # pragma: no cover - a stream ends with its result
        raise AssertionError("no result")
    if not result.text.startswith(sent):  # an attempt was lost half-way, and the next one sent something else
        message = "a node was lost and the text began anew: retrieve the response to have it whole"
        yield _event(number, "error", code="restarted", message=message, param=None)
    elif result.output is not None:
        if number == _FIRST_PIECE:
            for event in _opening(item, where):
                yield event
        if rest := result.text[len(sent) :]:
            yield _delta(number, where, rest)
        number += 1
        whole = message_item(accepted.id, result.text, "completed")
        yield _event(number, "response.output_text.done", **where, text=result.text, logprobs=[])
        yield _event(number + 1, "response.content_part.done", **where, part=whole["content"][0])
        yield _event(number + 2, "response.output_item.done", output_index=0, item=whole)
        number += 3
    final = in_state(result.state, result)
    kind = {"completed": "completed", "failed": "failed"}.get(final["status"], "incomplete")
    yield _event(number + 1, f"response.{kind}", response=final)


def _event(number: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "sequence_number": number, **fields}


def _opening(item: dict[str, Any], where: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        _event(2, "response.output_item.added", output_index=0, item={**item, "content": []}),
        _event(3, "response.content_part.added", **where, part=item["content"][0]),
    ]


def _delta(number: int, where: dict[str, Any], text: str) -> dict[str, Any]:
    return _event(number, "response.output_text.delta", **where, delta=text, logprobs=[])
