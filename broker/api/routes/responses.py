"""`/v1/responses`: in the background or not, streamed or not; retrieved, streamed again, cancelled, deleted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from perllm.broker.api import sse
from perllm.broker.api.callers import Caller
from perllm.broker.api.dependencies import TheApi, TheCaller, header_fields
from perllm.broker.api.errors import ApiError
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import Deleted, InputItemPage, ResponseObject
from perllm.broker.api.paging import After, Limit, Order, page
from perllm.broker.api.request_body import flag, read_json
from perllm.broker.api.state import Api
from perllm.broker.api.submission import Accepted
from perllm.broker.api.waiting import with_heartbeats
from perllm.broker.errors import PerLLMError
from perllm.broker.ledger import TaskRecord
from perllm.broker.messages import Result, State
from perllm.broker.openai import responses
from perllm.broker.openai.items import output_items, referred
from perllm.broker.openai.requests import ResponseRequest
from perllm.broker.openai.response_events import ResponseStream
from perllm.broker.openai.responses import response_object
from perllm.broker.openai.translation import RESPONSES

router = APIRouter(tags=["Responses"])

#: Most earlier responses to whose items one input may refer.
MAX_REFERRED = 32


@router.post(
    RESPONSES,
    openapi_extra=takes_task(
        ResponseRequest,
        plain=examples.RESPONSE_REQUEST,
        background=examples.BACKGROUND_REQUEST,
        tools=examples.CALLING_REQUEST,
    ),
    responses=answers(ResponseObject, examples.RESPONSE, 404, 408, 413, 422, events=examples.RESPONSE_STREAM),
)
async def create_response(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Make a response. With `background`, this answers at once and it runs on its own; without, this waits, and cancels
    it when the client goes away."""
    headers = header_fields(request)
    body = await read_json(request)
    stream, background = flag(body, "stream"), flag(body, "background")
    before = await _before(api, caller, body.get("previous_response_id"))
    fields = responses.fields(await _resolved(api, caller, body), before)
    spec = await api.tasks.accept(caller, {**headers, **fields, "stream": stream}, given=body)
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
    return JSONResponse(response_object(accepted.id, accepted.spec, accepted.submitted, state, result))


async def _before(api: Api, caller: Caller, previous: Any) -> list[dict[str, Any]]:
    """The turns of an earlier response and its answer."""
    if previous is None:
        return []
    if not isinstance(previous, str):
        raise ApiError(400, "previous_response_id: a string is required", param="previous_response_id")
    record = await api.tasks.record(caller, previous, "response")
    if record.result is None or record.result.output is None:
        raise ApiError(400, f"previous_response_id: {previous!r} has no output", param="previous_response_id")
    return responses.turns_after(record.spec, record.result)


async def _resolved(api: Api, caller: Caller, body: dict[str, Any]) -> dict[str, Any]:
    """The body, its references to items of earlier responses replaced by these."""
    places = referred(body.get("input"))
    if not places:
        return body
    tasks = dict.fromkeys(task_id for task_id, _ in places.values())
    if len(tasks) > MAX_REFERRED:
        message = f"input: refers to items of {len(tasks)} responses; the limit is {MAX_REFERRED}"
        raise ApiError(400, message, param="input")
    known: dict[str, dict[str, Any]] = {}
    for task_id in tasks:
        result = (await api.tasks.record(caller, task_id, "response")).result
        if result is not None and result.output is not None:
            known |= {item["id"]: item for item in output_items(task_id, result.output, "completed")}
    items = list(body["input"])
    for number, (_, identity) in places.items():
        if identity not in known:
            field = f"input.{number}.id"
            raise ApiError(404, f"{field}: no item {identity[:80]!r}", param=field, code="not_found")
        items[number] = known[identity]
    return {**body, "input": items}


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


@router.get(RESPONSES + "/{id}/input_items", responses=answers(InputItemPage, examples.page(examples.INPUT_ITEM), 404))
async def list_input_items(
    id: str, api: TheApi, caller: TheCaller, limit: Limit = 20, after: After = None, order: Order = "desc"
) -> Response:
    """What a response was made of, those it went on from included, as items. Turns that stood in messages are shown as
    the items they could have been."""
    record = await api.tasks.record(caller, id, "response")
    items = responses.input_items(id, record.spec)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    first = 0 if after is None else ids.index(after) + 1 if after in ids else len(ids)
    return JSONResponse(page(items[first : first + limit], len(items) > first + limit))


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
    return response_object(record.id, record.spec, record.submitted, record.state, record.result)


async def _events(api: Api, accepted: Accepted, *, background: bool, after: int) -> AsyncIterator[str]:
    """The events with a number above `after`. The same event has the same number whenever it is read."""
    done = False
    events = ResponseStream(accepted.id, accepted.spec, accepted.submitted)

    def said(some: Iterable[dict[str, Any]]) -> str:
        return "".join(sse.event(each, each["type"]) for each in some if each["sequence_number"] > after)

    try:
        if text := said(events.opening()):
            yield text
        async for piece in with_heartbeats(api.client.deltas(accepted.id), api.stopping):
            if piece is None:
                yield sse.HEARTBEAT
                continue
            done = isinstance(piece, Result)
            if text := said(events.end(piece) if isinstance(piece, Result) else events.piece(piece)):
                yield text
    except PerLLMError as error:  # too late for a status
        done = True
        number = 2**53 - 1  # which no event of the response has
        failure = {"type": "error", "sequence_number": number, "code": "unavailable", "message": str(error)}
        yield sse.event({**failure, "param": None}, "error")
    finally:
        if not done and not background:
            api.results.abandon(accepted)
