"""`/v1/responses`: in the background or not, streamed or not; retrieved, watched from any point on, cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from perllm.broker.api import sse
from perllm.broker.api.errors import ApiError
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import Deleted, ResponseObject, ResponseRequest
from perllm.broker.api.requests import Accepted, Api, Caller, Extensions, TheApi, TheCaller, read_json, with_pauses
from perllm.broker.api.routes.completions import flag
from perllm.broker.errors import InvalidTask, PerLLMError
from perllm.broker.ledger import TaskRecord
from perllm.broker.messages import Result, State
from perllm.broker.openai.translation import RESPONSES, message_item, response_object, task_fields

router = APIRouter(tags=["Responses"])

#: Sequence number of the first piece of text: before it come created, in_progress, and the item and part it is in.
_FIRST_PIECE = 4


@router.post(
    RESPONSES,
    openapi_extra=takes_task(ResponseRequest, plain=examples.RESPONSE_REQUEST, background=examples.BACKGROUND_REQUEST),
    responses=answers(ResponseObject, examples.RESPONSE, 404, 408, 413, 422, events=examples.RESPONSE_STREAM),
)
async def create_response(request: Request, api: TheApi, caller: TheCaller, extensions: Extensions) -> Response:
    """Make a response. With `background`, it goes on whoever listens, and this answers at once; without, this waits,
    and cancels it when the client goes away."""
    body = await read_json(request)
    stream, background = flag(body, "stream"), flag(body, "background")
    if body.get("input") is None:
        raise ApiError(400, "input: this field is required", param="input")
    previous = body.pop("previous_response_id", None)
    fields = task_fields(body, RESPONSES)
    if previous is not None:
        fields["messages"] = await _continued(api, caller, previous, fields["messages"])
    try:
        spec = await api.accept(caller, {**extensions, **fields, "stream": stream})
    except InvalidTask as error:
        raise InvalidTask(str(error).replace("max_tokens:", "max_output_tokens:")) from None
    if background and not stream:
        (accepted,) = await api.submit(caller, [spec])
        state, result = State.PENDING, None
        if accepted.repeated:
            record = await api.record(caller, accepted.id)
            state, result = record.state, record.result
    else:
        with api.seat(caller) as seat:
            (accepted,) = await api.submit(caller, [spec])
            if stream:
                return sse.answer(_events(api, accepted, background=background, after=-1), seat.pop_all())
            result = await api.result(accepted, request)
            state = result.state
    return JSONResponse(
        response_object(accepted.id, accepted.spec, accepted.submitted, state, result, background=background)
    )


async def _continued(api: Api, caller: Caller, previous: Any, turns: list[Any]) -> list[Any]:
    """The turns after those of an earlier response, whose instructions do not carry over."""
    if not isinstance(previous, str):
        raise ApiError(400, "previous_response_id: a string is required", param="previous_response_id")
    record = await api.record(caller, previous, "response")
    if record.result is None or record.result.output is None:
        raise ApiError(400, f"previous_response_id: {previous!r} has no output", param="previous_response_id")
    spec = record.spec
    before = [m.model_dump() for m in spec.messages or ()] or [{"role": "user", "content": spec.prompt}]
    if before[0]["role"] == "system":
        del before[0]
    system = [t for t in turns[:1] if t["role"] == "system"]
    answer = {"role": "assistant", "content": record.result.text}
    return [*system, *before, answer, *turns[len(system) :]]


@router.get(
    RESPONSES + "/{id}",
    responses=answers(ResponseObject, examples.RESPONSE, 404, events=examples.RESPONSE_STREAM),
)
async def retrieve_response(
    id: str,
    api: TheApi,
    caller: TheCaller,
    stream: Annotated[bool, Query(description="Watch it instead: its events so far, and those to come.")] = False,
    starting_after: Annotated[
        int | None, Query(ge=0, le=2**53, description="With `stream`: only events after this sequence number.")
    ] = None,
) -> Response:
    """A response as it is now, or its events. Text streams while it is generated if the response was made with
    `stream`, and at the end if not."""
    record = await api.record(caller, id, "response")
    if stream:
        after = -1 if starting_after is None else starting_after
        accepted = Accepted(id, record.spec, record.submitted)
        with api.seat(caller) as seat:
            return sse.answer(_events(api, accepted, background=True, after=after), seat.pop_all())
    return JSONResponse(_shown(record))


@router.post(RESPONSES + "/{id}/cancel", responses=answers(ResponseObject, examples.RESPONSE, 404))
async def cancel_response(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Cancel a response. One that has ended stays as it is."""
    await api.record(caller, id, "response")
    await api.client.cancel(id)
    return JSONResponse(_shown(await api.record(caller, id, "response")))


@router.delete(
    RESPONSES + "/{id}", responses=answers(Deleted, {**examples.DELETED, "id": "resp-1", "object": "response"}, 404)
)
async def delete_response(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Forget a response for good. One that goes on is cancelled first."""
    await api.record(caller, id, "response")
    await api.quick.run(caller.tenant, api.ledger.forget, id)
    return JSONResponse({"id": id, "object": "response", "deleted": True})


def _shown(record: TaskRecord) -> dict[str, Any]:
    return response_object(record.id, record.spec, record.submitted, record.state, record.result, background=True)


async def _events(api: Api, accepted: Accepted, *, background: bool, after: int) -> AsyncIterator[str]:
    """The events with a number above `after`. The same event has the same number whenever it is read."""
    done = False
    try:
        async for event in with_pauses(_numbered(api, accepted, background)):
            if event is None:
                yield sse.STILL_HERE
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
            api.abandon(accepted)


async def _numbered(api: Api, accepted: Accepted, background: bool) -> AsyncIterator[dict[str, Any]]:
    def shown(state: State, result: Result | None = None) -> dict[str, Any]:
        return response_object(accepted.id, accepted.spec, accepted.submitted, state, result, background=background)

    item = message_item(accepted.id, "", "in_progress")
    where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield _event(0, "response.created", response=shown(State.PENDING))
    yield _event(1, "response.in_progress", response=shown(State.RUNNING))
    said, number = "", _FIRST_PIECE
    async for piece in api.client.stream(accepted.id):
        if isinstance(piece, Result):
            result = piece
            break
        if number == _FIRST_PIECE:
            for event in _opening(item, where):
                yield event
        if piece:
            yield _delta(number, where, piece)
        said += piece
        number += 1
    else:  # pragma: no cover - a stream ends with its result
        raise AssertionError("no result")
    if not result.text.startswith(said):  # an attempt was lost half-way, and the next one said something else
        message = "a node was lost and the text began anew: retrieve the response to have it whole"
        yield _event(number, "error", code="restarted", message=message, param=None)
    elif result.output is not None:
        if number == _FIRST_PIECE:
            for event in _opening(item, where):
                yield event
        if rest := result.text[len(said) :]:
            yield _delta(number, where, rest)
        number += 1
        whole = message_item(accepted.id, result.text, "completed")
        yield _event(number, "response.output_text.done", **where, text=result.text, logprobs=[])
        yield _event(number + 1, "response.content_part.done", **where, part=whole["content"][0])
        yield _event(number + 2, "response.output_item.done", output_index=0, item=whole)
        number += 3
    final = shown(result.state, result)
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
