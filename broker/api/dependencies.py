"""What endpoints ask for: the process's state, the caller, the fields given as headers."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from perllm.broker.api.callers import Caller
from perllm.broker.api.errors import ApiError
from perllm.broker.api.openapi.document import TASK_HEADERS
from perllm.broker.api.request_limits import CALLER
from perllm.broker.api.state import Api


async def _api(request: Request) -> Api:  # asynchronous, or FastAPI would run it in a thread
    return cast(Api, request.app.state.api)


class _ApiKey(HTTPBearer):
    """Its caller, found in one step: every dependency of an endpoint costs as much as the check of a small body."""

    def __init__(self) -> None:
        about = "A key made with `perllm api keys make`."
        super().__init__(auto_error=False, scheme_name="API key", description=about)

    async def __call__(self, request: Request) -> Caller:  # type: ignore[override]
        api: Api = request.app.state.api
        given = await super().__call__(request)
        caller = await api.callers.admit(given.credentials if given else None)
        request.scope[CALLER] = caller.name
        return caller


_HEADERS = {field: header["name"] for field, header in TASK_HEADERS.items()}


def header_fields(request: Request) -> dict[str, Any]:
    """The fields of a task that are given as headers. Raises ApiError."""
    given = {field: value for field, name in _HEADERS.items() if (value := request.headers.get(name)) is not None}
    if "value" in given:
        try:
            return {**given, "value": float(given["value"])}
        except ValueError:
            raise ApiError(400, "X-PerLLM-Value: a number is required", param="X-PerLLM-Value") from None
    return given


TheApi = Annotated[Api, Depends(_api)]
TheCaller = Annotated[Caller, Depends(_ApiKey())]
