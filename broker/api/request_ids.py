"""`x-request-id`: a name for each request, the client's own or a new one, in its answer and in its lines of the log."""

from __future__ import annotations

import json
import re
from random import getrandbits

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perllm.broker.api.errors import error_body

HEADER = b"x-request-id"
#: A client's own name is taken if it is one of these, and so harmless in a log or a header.
_NAME = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

log = structlog.get_logger(__name__)


def new_request_id() -> str:
    """A name that nothing else has."""
    return f"req_{getrandbits(128):032x}"


class RequestIds:
    """ASGI middleware around all others: names each request, and answers what went wrong in an unforeseen way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        request_id = given.decode() if _NAME.fullmatch(given) else new_request_id()
        begun = False

        async def naming(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id.encode())]}
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
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
