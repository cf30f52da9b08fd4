"""What endpoints ask FastAPI for: the process's state, the caller, the fields given as headers."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from perllm.broker.api.callers import Caller
from perllm.broker.api.errors import ApiError
from perllm.broker.api.openapi.document import TASK_HEADERS
from perllm.broker.api.request_limits import CALLER
from perllm.broker.api.state import Api


async def _api(request: Request) -> Api:  # asynchronous, or FastAPI would run it in a thread
    return cast(Api, request.app.state.api)


_bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="A key made with `perllm api keys make`.")


async def _caller(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    api: Api = request.app.state.api
    caller = await api.callers.admit(given.credentials if given else None)
    request.scope[CALLER] = caller.name
    return caller


_HEADERS = {field: header["name"] for field, header in TASK_HEADERS.items()}


async def _header_fields(request: Request) -> dict[str, Any]:
    given = {field: value for field, name in _HEADERS.items() if (value := request.headers.get(name)) is not None}
    if "value" in given:
        try:
            return {**given, "value": float(given["value"])}
        except ValueError:
            raise ApiError(400, "X-PerLLM-Value: a number is required", param="X-PerLLM-Value") from None
    return given


TheApi = Annotated[Api, Depends(_api)]
TheCaller = Annotated[Caller, Depends(_caller)]
HeaderFields = Annotated[dict[str, Any], Depends(_header_fields)]
