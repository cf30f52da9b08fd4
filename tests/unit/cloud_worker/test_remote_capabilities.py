"""What a remote server can do is what its answers show, not what it accepts."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from perllm.broker.capabilities import Capability as C
from perllm.cloud_worker.openai_api import Refused, TimedOut, Unavailable
from perllm.cloud_worker.remote_capabilities import ASKS, SERVED, Found, look

EVERYTHING = frozenset(C)
CHATS = (C.CHAT, C.CHOICES, C.GENERATE)


class Server:
    """Heeds what it is told to, in OpenAI's terms, and ignores the rest."""

    def __init__(self, *heeds: C, own_schema: bool = False) -> None:
        self.heeds, self.own_schema = set(heeds), own_schema

    async def __call__(self, path: str, body: dict[str, Any]) -> Any:
        if path == "embeddings":
            return {"data": [{"embedding": [0.5, -1.0] if C.EMBEDDINGS in self.heeds else [[0.5], [1.0]]}]}
        if path == "rerank":
            return {
                "results": [{"index": i, "relevance_score": i / 2} for i in range(2 if C.RERANK in self.heeds else 0)]
            }
        usage = {"prompt_tokens": 1 + 15 * (C.INFILL in self.heeds and "suffix" in body)}
        if isinstance(body.get("prompt"), list):
            usage = {"prompt_tokens": 3 if C.TOKENS in self.heeds else 9}
        message: dict[str, Any] = {"role": "assistant", "content": "Hello! How may I help you?"}
        choice: dict[str, Any] = {"message": message, "text": "x", "logprobs": None}
        if "logprobs" in body and C.LOGPROBS in self.heeds:
            choice["logprobs"] = {"content": [{"logprob": -1.0, "top_logprobs": [{"token": "x", "logprob": -1.0}]}]}
        if "grammar" in body and C.GRAMMAR in self.heeds:
            message["content"] = "perllm"
        if "logit_bias" in body and C.LOGIT_BIAS in self.heeds:
            message["content"] = " the the the the"
        if body.get("tool_choice") == "required" and C.TOOLS in self.heeds:
            call = {"id": "1", "type": "function", "function": {"name": "ping", "arguments": "{}"}}
            message |= {"content": None, "tool_calls": [call]}
        if "reasoning_effort" in body and C.REASONING in self.heeds:
            message["reasoning_content"] = "They want a greeting."
        if form := body.get("response_format"):
            if self.own_schema and form["type"] == "json_schema":
                raise Refused("HTTP 422: response_format", 422)
            if C.JSON_SCHEMA in self.heeds and ("schema" in form) is self.own_schema:
                message["content"] = '{"said": "perllm"}'
        return {"choices": [choice], "usage": usage}


def found(server: Any, served: frozenset[C] = EVERYTHING) -> Found:
    return asyncio.run(look(server, "max_tokens", served=served))


def test_every_capability_is_asked_for() -> None:
    assert {*ASKS, *CHATS, C.JSON_SCHEMA} == EVERYTHING


@pytest.mark.parametrize("capability", sorted(EVERYTHING - set(CHATS)))
def test_one_thing_alone_is_found(capability: C) -> None:
    assert found(Server(capability)) == Found(tuple(sorted((*CHATS, capability))))


def test_what_is_accepted_and_ignored_is_not_offered() -> None:
    assert found(Server()) == Found(CHATS)


def test_a_server_with_a_form_of_its_own_for_schemas() -> None:
    assert found(Server(C.JSON_SCHEMA, own_schema=True)) == Found((*CHATS, C.JSON_SCHEMA), own_schema=True)


def test_what_the_engine_does_not_pass_on_is_not_even_asked() -> None:
    asked: list[dict[str, Any]] = []

    async def server(path: str, body: dict[str, Any]) -> Any:
        asked.append(copy.deepcopy(body))
        return await Server(*EVERYTHING)(path, body)

    assert found(server, SERVED).capabilities == tuple(sorted(SERVED))
    assert not any("documents" in body or "n" in body for body in asked)


@pytest.mark.parametrize(
    "answer",
    [Refused("no", 400), Unavailable("busy"), TimedOut("silent"), None, [], "text", {"choices": []}, {"choices": [{}]},
     {"choices": [{"message": {"tool_calls": [{}] * 3, "content": 7}}]}, {"data": [{"embedding": []}]}],
)  # fmt: skip
def test_a_server_that_cannot_be_told_is_not_assumed_to(answer: Any) -> None:
    async def server(path: str, body: dict[str, Any]) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert found(server) == Found(CHATS)
