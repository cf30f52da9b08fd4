"""What the OpenAPI document says of bodies and answers.

Bodies are checked where they become tasks, as everywhere else, so the models of requests are read here and not run.
`tests/integration/test_api_document.py` holds that the document and the API agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from perllm.broker.api.openapi import schemas

_REF = "#/components/schemas/{model}"
_requests: set[type[BaseModel]] = set()

_FAILURES = {
    400: "Something in the request is wrong; `param` names the field.",
    401: "No API key, or one that is not valid.",
    404: "There is no such thing, or it is another tenant's.",
    408: "The body did not come in time.",
    409: "The webhook is disabled; it can be enabled again.",
    413: "The body is too large.",
    422: "The task ended without a result, or its idempotency key was used for another request.",
    429: "Too many requests, or too many unfinished tasks; `Retry-After` says when to try again.",
    503: "The queue cannot be reached; nothing was stored.",
}


def takes(model: type[BaseModel], **examples: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of an endpoint that takes a JSON body."""
    _requests.add(model)
    content = {
        "schema": {"$ref": _REF.format(model=model.__name__)},
        "examples": {name: {"value": example} for name, example in examples.items()},
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _header(name: str, about: str, example: Any, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": about, "schema": schema, "example": example}


#: The headers of endpoints that make tasks, by the field each gives, for clients that cannot add fields to a body; a
#: body's field goes first.
TASK_HEADERS = {
    "idempotency_key": _header(
        "Idempotency-Key",
        "A request repeated under the same key gives the first one's task instead of another.",
        "order-4711",
        type="string",
        minLength=1,
        maxLength=256,
    ),
    "deadline": _header(
        "X-PerLLM-Deadline",
        "Seconds from now, or a time (RFC 3339), by which the answer is needed.",
        "30",
        type="string",
        maxLength=64,
    ),
    "value": _header(
        "X-PerLLM-Value", "The task's weight when not all can be on time, up to the key's.", 1.0, type="number"
    ),
    "service": _header(
        "X-PerLLM-Service",
        "The class whose lengths and rewards are learned together.",
        "chat",
        type="string",
        maxLength=128,
    ),
}


def takes_task(model: type[BaseModel], **examples: Mapping[str, Any]) -> dict[str, Any]:
    """`takes` for an endpoint that makes tasks."""
    return {**takes(model, **examples), "parameters": list(TASK_HEADERS.values())}


def answers(
    model: type[BaseModel] | UnionType | None, example: Mapping[str, Any], *failures: int, events: str | None = None
) -> dict[int | str, dict[str, Any]]:
    """`responses` of an endpoint: what it answers, the failures beside those any request can meet, and what it streams
    if asked to."""
    content: dict[str, Any] = {"application/json": {"example": example}}
    if events is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}, "example": events}
    answer: dict[str, Any] = {"description": "Done.", "content": content}
    if model is not None:
        answer["model"] = model
    return {200: answer, **{status: _failure(status) for status in sorted({400, 401, 429, 503, *failures})}}


def _failure(status: int) -> dict[str, Any]:
    example = {"error": {"message": _FAILURES[status], "type": "invalid_request_error", "param": None, "code": None}}
    return {
        "model": schemas.ErrorDocument,
        "description": _FAILURES[status],
        "content": {"application/json": {"example": example}},
    }


def install(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Have the app describe itself, and these routers' endpoints, with these."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, routers)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    known = document["components"]["schemas"]
    _, definitions = models_json_schema([(m, "validation") for m in _requests], ref_template=_REF)
    known |= definitions["$defs"]
    for path in document["paths"].values():
        for operation in path.values():
            said = operation["responses"].get("422", {})
            if "HTTPValidationError" in str(said):  # such mistakes are a 400 here, as in OpenAI's API
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    _restore_examples(routers, document)
    return document


def _restore_examples(routers: Iterable[APIRouter], document: dict[str, Any]) -> None:
    """FastAPI leaves fields out of examples that are null."""
    every = (route for router in routers for route in router.routes if isinstance(route, APIRoute))
    for route in (route for route in every if route.include_in_schema):
        for method in route.methods or ():
            described = document["paths"][route.path_format][method.lower()]["responses"]
            for status, answer in route.responses.items():
                for kind, content in answer.get("content", {}).items():
                    if "example" in content and str(status) in described:
                        described[str(status)]["content"][kind]["example"] = content["example"]
