"""Every error in the OpenAI API's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Send

from perllm.broker.errors import (
    InvalidTask,
    StoreUnavailable,
    TaskNotFound,
    TryAgain,
    Unreachable,
    Unreadable,
    WaitTimeout,
)

log = structlog.get_logger(__name__)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 408: "request_timeout"}


class ApiError(HTTPException):
    """An error with an HTTP status. `param` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code, self.more = param, code, dict(more or {})


def not_found(what: str, identity: str) -> ApiError:
    """For what does not exist, and in the same words for what is another tenant's."""
    return ApiError(404, f"no {what} {identity[:80]!r}", param="id", code="not_found")


def over_quota(message: str) -> ApiError:
    """For what would be more than a tenant may have stored. Trying again by itself would not help a client."""
    return ApiError(429, message, code="quota_exceeded", headers={"X-Should-Retry": "false"})


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None, **more: Any
) -> dict[str, Any]:
    """An error's body."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status), **more}}


async def refuse(send: Send, status: int, message: str, *, retry_after: int | None = None) -> None:
    """Answer a request that is not let in, from a middleware. The connection ends with it."""
    body = json.dumps(error_body(status, message, code="unavailable" if status == 503 else None)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def invalid_task(error: InvalidTask) -> ApiError:
    """A task that is not acceptable."""
    said = str(error)
    named = re.match(r"([\w.]+): ", said)
    param = named[1] if named and named[1] != "task" else None
    if isinstance(error, TryAgain):
        return ApiError(429, said, param=param, code="try_again", headers={"Retry-After": "10"})
    if param == "model" and "no live node serves" in said:
        return ApiError(404, said, param=param, code="model_not_found")
    return ApiError(400, said, param=param, code="invalid_task")


def install(app: FastAPI) -> None:
    """Answer every failure that is foreseen in this shape; what is not, `request_ids` answers."""

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            body = error_body(error.status_code, str(error.detail), error.param, error.code, **error.more)
        else:
            body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return JSONResponse(error_body(400, f"{param}: {first['msg']}" if param else first["msg"], param), 400)

    @app.exception_handler(InvalidTask)
    async def _task(request: Request, error: InvalidTask) -> JSONResponse:
        return await _http(request, invalid_task(error))

    @app.exception_handler(TaskNotFound)
    async def _unknown(_: Request, error: TaskNotFound) -> JSONResponse:
        return JSONResponse(error_body(404, str(error), "id", "not_found"), 404)

    @app.exception_handler(Unreadable)
    async def _unreadable(_: Request, error: Unreadable) -> JSONResponse:
        log.error("record_unreadable", reason=str(error))
        message = "what is stored of it cannot be read"
        return JSONResponse(error_body(500, message, code="unreadable"), 500, {"X-Should-Retry": "false"})

    @app.exception_handler(WaitTimeout)
    async def _late(_: Request, error: WaitTimeout) -> JSONResponse:
        return JSONResponse(error_body(504, str(error), code="timeout"), 504, {"X-Should-Retry": "false"})

    @app.exception_handler(Unreachable)
    async def _unreachable(_: Request, error: Unreachable) -> JSONResponse:
        log.error("ledger_unreachable", reason=str(error))
        message = "the queue cannot be reached now; nothing was stored, try again"
        return JSONResponse(error_body(503, message, code="unavailable"), 503, {"Retry-After": "2"})

    @app.exception_handler(StoreUnavailable)
    async def _no_files(_: Request, __: StoreUnavailable) -> JSONResponse:
        message = "files cannot be stored or read now: try again later"
        return JSONResponse(error_body(503, message, code="unavailable"), 503, {"Retry-After": "5"})
