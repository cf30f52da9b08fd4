"""Every answer begins within a time: whatever it waits for may never come."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perllm.broker.api.errors import refuse

#: Seconds after the last of its request came in at which an answer must begin, unless it is one that waits.
ANSWER_TIME = 30.0
_LIMIT = "perllm.time_limit"


def lift_time_limit(scope: Scope) -> None:
    """This request's answer waits for something that has a limit of its own."""
    limit: asyncio.Timeout = scope[_LIMIT]
    limit.reschedule(None)


class TimeLimit:
    """ASGI middleware: an answer that has not begun in time is an error (503)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        limit = scope[_LIMIT] = asyncio.timeout(ANSWER_TIME)

        async def receiving() -> Message:
            message = await receive()
            if limit.when() is not None and not limit.expired():
                limit.reschedule(clock() + ANSWER_TIME)
            return message

        async def sending(message: Message) -> None:
            if limit.when() is not None and not limit.expired():
                limit.reschedule(None)
            await send(message)

        try:
            async with limit:
                await self._app(scope, receiving, sending)
        except TimeoutError:
            if not limit.expired():  # it is another
                raise
            await refuse(send, 503, "this took too long: try again later", retry_after=5)
