"""Files: `/v1/files`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial
from typing import IO, Annotated, Any, cast
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile

from perllm.broker.api.callers import Caller
from perllm.broker.api.dependencies import TheApi, TheCaller
from perllm.broker.api.errors import ApiError, not_found
from perllm.broker.api.files.store import ContentMissing, FileDocument
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers
from perllm.broker.api.openapi.schemas import Deleted, FileObject, FilePage
from perllm.broker.api.paging import After, Order, page
from perllm.broker.api.request_body import refuse_unknown
from perllm.broker.api.state import Api
from perllm.broker.api.submission import MAX_ID
from perllm.broker.api.time_limit import lift_time_limit

router = APIRouter(tags=["Files"])

PURPOSES = ("batch", "user_data")
#: Bytes of a file sent at once.
_CHUNK = 1 << 20
#: Most reads, of a thousand files each, for one page.
_MAX_READS = 12
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f/\\]|^\.{0,2}$")


def file_object(file: FileDocument) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created),
        "expires_at": int(file.expires),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


#: The fields of an upload's form.
UPLOAD_FIELDS: dict[str, dict[str, Any]] = {
    "file": {"type": "string", "format": "binary", "description": "its content and its name"},
    "purpose": {"type": "string", "enum": list(PURPOSES), "description": " or ".join(f"`{p}`" for p in PURPOSES)},
    "expires_after[anchor]": {"type": "string", "enum": ["created_at"], "description": "only `created_at`"},
    "expires_after[seconds]": {
        "type": "integer",
        "minimum": 3600,
        "maximum": 2592000,
        "description": "how long it is kept, from 3600 to 2592000",
    },
}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["file", "purpose"], "properties": UPLOAD_FIELDS},
                "example": {"purpose": "batch", "file": '{"custom_id": "1", "body": {"prompt": "Hi"}}'},
            }
        },
    }
}


@router.post("/v1/files", openapi_extra=_UPLOAD, responses=answers(FileObject, examples.FILE, 408, 413))
async def upload_file(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Upload a file of at most 200 MB. A batch's input is JSON Lines."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":  # any other form would be read into memory
        raise ApiError(400, "the body must be multipart/form-data", param="file")
    # Others may take very long to decode.
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise ApiError(400, "the form's charset must be UTF-8", param="file")
    lift_time_limit(request.scope)  # what is behind may be far and slow; `api.disk` has a limit
    with api.uploads.slot(caller):
        return JSONResponse(file_object(await _store_upload(request, api, caller)))


async def _store_upload(request: Request, api: Api, caller: Caller) -> FileDocument:
    await api.disk.run(caller.tenant, api.files.check_room, caller.tenant)
    async with request.form(max_files=1, max_fields=8, max_part_size=64 << 10) as form:
        refuse_unknown(form, UPLOAD_FIELDS)
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise ApiError(400, "file: a file is required, whole, as multipart/form-data", param="file")
        name = upload.filename or ""
        if _BAD_NAME.search(name) or len(name) > 255:
            message = f"file: the name {name[:80]!r} is not one: at most 255 characters, no path, no control characters"
            raise ApiError(400, message, param="file")
        purpose = form.get("purpose")
        if purpose not in PURPOSES:
            raise ApiError(400, f"purpose: {' or '.join(PURPOSES)} is required", param="purpose")
        if (upload.size or 0) > api.settings.api_max_file:
            raise ApiError(413, f"file: more than {api.settings.api_max_file} bytes", param="file")
        lasts = _lasts(form, api.settings.api_file_retention)
        content = iter([cast("IO[bytes]", upload.file)])
        keep = partial(api.files.keep, caller.tenant, name, purpose, content, lasts=lasts, within_quota=True)
        return await api.disk.run(caller.tenant, keep)


def _lasts(form: FormData, most: float) -> float | None:
    if form.get("expires_after[anchor]", "created_at") != "created_at":
        param = "expires_after[anchor]"
        raise ApiError(400, f"{param}: only created_at is supported", param=param)
    given = form.get("expires_after[seconds]")
    if given is None:
        return None
    if not isinstance(given, str) or not re.fullmatch(r"\d{1,8}", given) or not 3600 <= int(given) <= 30 * 86_400:
        param = "expires_after[seconds]"
        raise ApiError(400, f"{param}: a number from 3600 to 2592000 is required", param=param)
    return min(float(given), most)


@router.get("/v1/files", responses=answers(FilePage, examples.page(examples.FILE)))
async def list_files(
    api: TheApi,
    caller: TheCaller,
    purpose: Annotated[str | None, Query(max_length=64, description="Only files for this.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="At most so many.")] = 100,
    after: After = None,
    order: Order = "desc",
) -> Response:
    """The tenant's files, by the time they were made."""

    def read() -> tuple[list[FileDocument], bool]:
        found: list[FileDocument] = []
        last, more = after, True
        for _ in range(_MAX_READS):
            if not more or len(found) > limit:
                break
            documents, more = api.files.documents.page(caller.tenant, after=last, limit=1000, newest=order == "desc")
            found += [d for d in documents if purpose in (None, d.purpose)]
            last = documents[-1].id if documents else last
        return found[:limit], more or len(found) > limit

    found, more = await api.slow.run(caller.tenant, read)
    return JSONResponse(page([file_object(file) for file in found], more))


@router.get("/v1/files/{id}", responses=answers(FileObject, examples.FILE, 404))
async def get_file(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A file less its content."""
    return JSONResponse(file_object(await _file(api, caller, id)))


@router.get(
    "/v1/files/{id}/content",
    response_class=StreamingResponse,
    responses={
        **answers(None, {}, 404),
        200: {
            "description": "The content.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
    },
)
async def get_file_content(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A file's content."""
    file = await _file(api, caller, id)
    try:
        content = await api.disk.run(caller.tenant, api.files.read, file)
        first = await api.disk.run(caller.tenant, content.read, _CHUNK)  # while an error can still be answered
    except ContentMissing as error:
        raise ApiError(404, str(error), param="id", code="not_found") from None
    except FileNotFoundError:  # removed in this moment
        raise not_found("content of file", id) from None

    async def chunks() -> AsyncIterator[bytes]:
        with content:
            chunk = first
            while chunk:
                yield chunk
                chunk = await api.disk.run(caller.tenant, content.read, _CHUNK)

    headers = {
        "Content-Length": str(file.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(chunks(), media_type="application/octet-stream", headers=headers)


@router.delete(
    "/v1/files/{id}", responses=answers(Deleted, {"id": "file-3f2a", "object": "file", "deleted": True}, 404)
)
async def delete_file(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Delete a file. The input of a batch that has not ended is refused."""
    file = await _file(api, caller, id)
    if file.id in await api.slow.run(caller.tenant, api.batches.inputs_in_use):
        raise ApiError(400, f"file {id} is the input of a batch that has not ended", param="id", code="file_in_use")
    await api.disk.run(caller.tenant, api.files.remove, file)
    return JSONResponse({"id": id, "object": "file", "deleted": True})


async def _file(api: TheApi, caller: TheCaller, identity: str) -> FileDocument:
    file = None
    if len(identity) <= MAX_ID:
        file = await api.quick.run(caller.tenant, api.files.documents.get, identity, caller.tenant)
    if file is None:
        raise not_found("file", identity)
    return file
