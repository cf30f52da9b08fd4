"""`x-request-id`: a name for each request, the client's own or a new one, in its answer and in the lines logged of it
and of its tasks. `traceparent`, where a client sends one, goes the same way (w3.org/TR/trace-context)."""

from __future__ import annotations

import json
import re
from contextvars import ContextVar
from random import getrandbits

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perllm.broker.api.errors import error_body
from perllm.broker.traceparent import trace_id, valid_traceparent

HEADER, TRACE_HEADER = b"x-request-id", b"traceparent"
#: A client's own name is taken if it is one of these, and so harmless in a log or a header.
_NAME = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

_origin: ContextVar[dict[str, str]] = ContextVar("origin")

log = structlog.get_logger(__name__)


def new_request_id() -> str:
    """A name that nothing else has."""
    return f"req_{getrandbits(128):032x}"


def origin() -> dict[str, str]:
    """The fields of a task (`request_id`, `traceparent`) by which it can be traced to the request under way, if one
    is."""
    return _origin.get({})


class RequestIds:
    """ASGI middleware around all others: names each request, and answers what went wrong in an unforeseen way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = trace = b""
        for name, value in scope["headers"]:
            if name == HEADER:
                given = given or value
            elif name == TRACE_HEADER:
                trace = value
        request_id = given.decode() if _NAME.fullmatch(given) else new_request_id()
        names, logged = {"request_id": request_id}, {"request_id": request_id}
        if trace and (traceparent := valid_traceparent(trace.decode("latin-1"))):
            names["traceparent"], logged["trace_id"] = traceparent, trace_id(traceparent)
        begun = False

        async def naming(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id.encode())]}
            await send(message)

        _origin.set(names)  # of this request's context, which ends with it
        with structlog.contextvars.bound_contextvars(**logged):
            try:
                await self._app(scope, receive, naming)
            except Exception:
                if begun:
                    raise
                log.exception("internal_error", method=scope["method"][:20], path=scope["path"][:200])
                await _fail(naming)


async def _fail(send: Send) -> None:
    body = json.dumps(error_body(500, "an internal error; it is in the server's log", code="internal")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
