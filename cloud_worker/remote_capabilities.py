"""What a remote server can do, found by asking: each capability by a tiny request, whose answer must show that it was
heeded. A server that refuses it, or answers as if it had not been asked, is not taken to have it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog

from perllm.broker.capabilities import Capability
from perllm.cloud_worker.openai_api import Refused, ServerError

log = structlog.get_logger(__name__)

#: What `remote_engine` passes on, and has to ask for.
SERVED = frozenset(
    {
        Capability.GENERATE,
        Capability.CHAT,
        Capability.CHOICES,
        Capability.TOOLS,
        Capability.REASONING,
        Capability.LOGPROBS,
        Capability.LOGIT_BIAS,
        Capability.GRAMMAR,
        Capability.JSON_SCHEMA,
        Capability.INFILL,
        Capability.TOKENS,
    }
)

_CHAT, _TEXT = "chat/completions", "completions"
_SCHEMA = {
    "type": "object",
    "properties": {"said": {"enum": ["perllm"]}},
    "required": ["said"],
    "additionalProperties": False,
}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_TOOL = {"type": "function", "function": {"name": "ping", "description": "Pings.", "parameters": _NO_PARAMETERS}}
_SUFFIX = " and so one two three four five six seven eight nine ten eleven twelve they counted"


class Ask(NamedTuple):
    """One request: where to, its fields beside the model, and what of the answer shows that it was heeded."""

    path: str
    fields: Mapping[str, Any]
    shows: Callable[[Any], Any]
    tokens: int = 1  # at most


def _choice(answer: Any) -> Any:
    return answer["choices"][0]


def _said(answer: Any) -> str:
    return str(_choice(answer)["message"]["content"])


def _repeats(text: str) -> bool:
    """Whether it is one token again and again."""
    words = text.split()
    return bool(text) and (len(set(words)) == 1 < len(words) or text == text[: len(text) // 4] * 4)


def _calls(answer: Any) -> bool:
    (call,) = _choice(answer)["message"]["tool_calls"]
    return bool(call["function"]["name"] == "ping" and json.loads(call["function"]["arguments"] or "{}") == {})


def _thought(answer: Any) -> bool:
    message = _choice(answer)["message"]
    details = (answer.get("usage") or {}).get("completion_tokens_details") or {}
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return bool(thoughts) or (details.get("reasoning_tokens") or 0) > 0


def _one_vector(answer: Any) -> bool:
    """Servers without pooling give one for each token."""
    (given,) = answer["data"]
    vector = given["embedding"]
    return isinstance(vector, list) and bool(vector) and all(isinstance(x, float | int) for x in vector)


def _ranked(answer: Any) -> bool:
    return len([float(result["relevance_score"]) for result in answer["results"]]) == 2


#: What shows each capability: all of it must.
ASKS: Mapping[Capability, tuple[Ask, ...]] = {
    Capability.LOGPROBS: (
        Ask(
            _CHAT,
            {"logprobs": True, "top_logprobs": 1},
            lambda answer: _choice(answer)["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] <= 0,
        ),
    ),
    Capability.GRAMMAR: (Ask(_CHAT, {"grammar": 'root ::= "perllm"'}, lambda a: _said(a).strip() == "perllm", 32),),
    Capability.LOGIT_BIAS: (Ask(_CHAT, {"logit_bias": {"1000": 100}}, lambda answer: _repeats(_said(answer)), 4),),
    Capability.TOOLS: (
        Ask(_CHAT, {"tools": [_TOOL]}, _choice),
        Ask(_CHAT, {"tools": [_TOOL], "tool_choice": "required"}, _calls, 64),
    ),
    Capability.REASONING: (Ask(_CHAT, {"reasoning_effort": "low"}, _thought, 64),),
    Capability.INFILL: (
        Ask(_TEXT, {"prompt": "They", "suffix": _SUFFIX}, lambda answer: answer["usage"]["prompt_tokens"] > 12),
    ),
    Capability.TOKENS: (
        Ask(_TEXT, {"prompt": [1000, 1001, 1002]}, lambda answer: answer["usage"]["prompt_tokens"] in (3, 4)),
    ),
    Capability.EMBEDDINGS: (Ask("embeddings", {"input": "a"}, _one_vector),),
    Capability.RERANK: (Ask("rerank", {"query": "a", "documents": ["a", "b"]}, _ranked),),
}
_STANDARD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA, "strict": True}}
_OWN_SCHEMA = {"type": "json_object", "schema": _SCHEMA}


def _schema_ask(form: Mapping[str, Any]) -> Ask:
    return Ask(_CHAT, {"response_format": form}, lambda answer: json.loads(_said(answer)) == {"said": "perllm"}, 32)


@dataclass(slots=True)
class Found:
    """What a server showed. `own_schema`: it takes JSON schemas in llama-cpp-python's form only."""

    capabilities: tuple[Capability, ...] = ()
    own_schema: bool = False


#: Posts a body (less the model) to a path of the API and gives the answer's JSON. Raises ServerError.
Post = Callable[[str, dict[str, Any]], Awaitable[Any]]


async def look(post: Post, limit: str, *, served: Set[Capability] = SERVED) -> Found:
    """Ask a server that was seen to chat for what is `served` beside. `limit` is its name for `max_tokens`. Several
    answers come from every server: from one that gives but one at a time, by as many requests."""
    found = {Capability.GENERATE, Capability.CHAT, Capability.CHOICES}
    for capability, asks in ASKS.items():
        if capability in served and all([await _shows(post, ask, limit) for ask in asks]):
            found.add(capability)
    own_schema = False
    if Capability.JSON_SCHEMA in served:
        standard = await _shows(post, _schema_ask(_STANDARD_SCHEMA), limit)
        own_schema = not standard and await _shows(post, _schema_ask(_OWN_SCHEMA), limit)
        if standard or own_schema:
            found.add(Capability.JSON_SCHEMA)
    return Found(tuple(sorted(found & served)), own_schema)


async def _shows(post: Post, ask: Ask, limit: str) -> bool:
    body: dict[str, Any] = dict(ask.fields)
    if ask.path == _CHAT:
        body |= {"messages": [{"role": "user", "content": "Say hello."}], limit: ask.tokens, "temperature": 0}
    elif ask.path == _TEXT:
        body |= {"max_tokens": ask.tokens, "temperature": 0}
    try:
        return bool(ask.shows(await post(ask.path, body)))
    except Refused as error:
        log.debug("remote_refuses", fields=sorted(ask.fields), reason=str(error))
    except ServerError as error:
        log.info("remote_not_told", fields=sorted(ask.fields), reason=str(error))
    except (LookupError, TypeError, ValueError, AttributeError):
        pass  # an answer that does not show it
    return False
