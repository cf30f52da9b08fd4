"""Batches: `/v1/batches`. `batches/runner.py` does the work."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, cast
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.batches.store import BatchDocument, batch_object
from perllm.broker.api.dependencies import TheApi, TheCaller
from perllm.broker.api.errors import ApiError, not_found, over_quota
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes
from perllm.broker.api.openapi.schemas import BatchObject, BatchPage, BatchRequest
from perllm.broker.api.paging import After, Limit, page
from perllm.broker.api.request_body import read_json, refuse_unknown
from perllm.broker.api.request_ids import origin
from perllm.broker.api.submission import MAX_ID
from perllm.broker.messages import MAX_DEADLINE
from perllm.broker.openai.translation import ENDPOINTS

router = APIRouter(tags=["Batches"])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")


@router.post(
    "/v1/batches",
    openapi_extra=takes(BatchRequest, nightly=examples.BATCH_REQUEST),
    responses=answers(BatchObject, examples.BATCH, 404, 408, 413),
)
async def create_batch(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Run a file's requests. Good lines run even if others are bad: those are in the error file. A line may carry a
    `deadline` of its own."""
    body = await read_json(request)
    refuse_unknown(body, BatchRequest.model_fields)
    endpoint, identity = body.get("endpoint"), body.get("input_file_id")
    if endpoint not in ENDPOINTS:
        raise ApiError(400, f"endpoint: one of {', '.join(ENDPOINTS)} is required", param="endpoint")
    seconds = _window_seconds(body.get("completion_window"))
    metadata = _metadata(body.get("metadata"))
    lasts = _output_lasts(body.get("output_expires_after"))
    if not isinstance(identity, str) or len(identity) > MAX_ID:
        raise ApiError(400, "input_file_id: a file's id is required", param="input_file_id")

    traced = origin()

    def create() -> BatchDocument | None:
        if api.files.documents.get(identity, caller.tenant) is None:
            return None
        most = api.settings.quota(caller.tenant).batches
        api.files.check_room(caller.tenant)  # for what comes of it
        if api.batches.count_open(caller.tenant) >= most:
            raise over_quota(f"this tenant may have {most} unfinished batches: wait for one to end, or cancel one")
        now = api.store.now()
        batch = BatchDocument(
            id=f"batch_{uuid4().hex}",
            tenant=caller.tenant,
            created=now,
            endpoint=endpoint,
            input_file_id=identity,
            max_value=caller.max_value,
            window=body["completion_window"],
            expires=now + seconds,
            metadata=metadata,
            origin=traced,
            output_lasts=lasts,
            key=caller.key.id if caller.key is not None else None,
        )
        api.batches.add(batch)
        return batch

    batch = await api.quick.run(caller.tenant, create)
    if batch is None:
        raise ApiError(404, f"input_file_id: no file {identity[:80]!r}", param="input_file_id", code="not_found")
    api.batch_runner.wake()
    return JSONResponse(batch_object(batch))


def _window_seconds(window: Any) -> float:
    form = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    seconds = int(form[1]) * _UNITS[form[2]] if form else 0
    if not 0 < seconds <= MAX_DEADLINE:
        message = "completion_window: a duration from 1s to 30d is required, as 90s, 15m, 24h or 7d"
        raise ApiError(400, message, param="completion_window")
    return float(seconds)


def _output_lasts(given: Any) -> float | None:
    match given:
        case None:
            return None
        case {"anchor": "created_at", "seconds": int(seconds)} if 3600 <= seconds <= MAX_DEADLINE and len(given) == 2:
            return float(seconds)
    message = "output_expires_after: anchor 'created_at' and seconds from 3600 to 2592000 are required"
    raise ApiError(400, message, param="output_expires_after")


def _metadata(given: Any) -> dict[str, str] | None:
    if given is None:
        return None
    good = isinstance(given, dict) and len(given) <= 16
    if not good or not all(isinstance(v, str) and len(k) <= 64 and len(v) <= 512 for k, v in given.items()):
        message = "metadata: at most 16 pairs, keys of at most 64 and strings of at most 512 characters"
        raise ApiError(400, message, param="metadata")
    return cast("dict[str, str]", given)


@router.get("/v1/batches", responses=answers(BatchPage, examples.page(examples.BATCH)))
async def list_batches(api: TheApi, caller: TheCaller, limit: Limit = 20, after: After = None) -> Response:
    """The tenant's batches, newest first."""
    found, more = await api.slow.run(
        caller.tenant, partial(api.batches.documents.page, caller.tenant, after=after, limit=limit)
    )
    return JSONResponse(page([batch_object(batch) for batch in found], more))


@router.get("/v1/batches/{id}", responses=answers(BatchObject, examples.BATCH, 404))
async def get_batch(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A batch as it is now, its counts live."""
    batch = await api.quick.run(caller.tenant, api.batches.documents.get, id, caller.tenant)
    if batch is None:
        raise not_found("batch", id)
    return JSONResponse(batch_object(batch))


@router.post("/v1/batches/{id}/cancel", responses=answers(BatchObject, examples.BATCH, 404))
async def cancel_batch(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Cancel a batch; what was done stays in its output. One that has ended stays as it is."""
    batch = await api.quick.run(caller.tenant, api.batches.cancel, id, caller.tenant)
    if batch is None:
        raise not_found("batch", id)
    api.batch_runner.look_at(id)
    return JSONResponse(batch_object(batch))
