"""A request that fails in an unforeseen way is answered, under its name, and the log has the reason."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from perllm.broker.api.request_ids import RequestIds


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/late":
        await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("secret")


async def ask(path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=RequestIds(broken))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path, headers={"x-request-id": "mine"})


def test_it_is_answered_without_its_reason() -> None:
    with capture_logs() as logs:
        answer = asyncio.run(ask("/"))
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text
    assert [line["event"] for line in logs] == ["internal_error"]


def test_an_answer_that_has_begun_is_cut() -> None:
    with pytest.raises(RuntimeError):
        asyncio.run(ask("/late"))
