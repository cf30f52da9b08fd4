"""The part of the OpenAI API a worker needs: the list of models, and completions as they are generated.

Source: OpenAI API reference, "Models", "Chat Completions", "Completions" and their streaming objects.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

#: Most bytes of one line of a stream, and of an error's body that is read.
MAX_LINE, MAX_ERROR = 1 << 20, 1 << 16
#: Seconds to connect.
CONNECT_TIMEOUT = 10.0


class ServerError(Exception):
    """The server did not do what it was asked."""


class Refused(ServerError):
    """It will not do it, however often it is asked. `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unavailable(ServerError):
    """It may do it later: it is overloaded, or failed. `wait` is what it asks for, s."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Unreachable(ServerError):
    """There is no connection to it."""


class TimedOut(ServerError):
    """It took the request and then sent nothing for too long."""


class Malformed(ServerError):
    """What it sent is not what the API promises."""


class _Tolerant(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Model(_Tolerant):
    """A model the server offers; `max_model_len` is vLLM's addition."""

    id: str
    max_model_len: int | None = None


class _Models(_Tolerant):
    data: list[Model]


class _Function(_Tolerant):
    name: str | None = None
    arguments: str | None = None


class ToolCallPiece(_Tolerant):
    """Part of a call of a tool; some servers leave out `index` where there is one call."""

    index: int | None = None
    id: str | None = None
    function: _Function = _Function()

    @field_validator("function", mode="before")
    @classmethod
    def _none(cls, given: Any) -> Any:
        return {} if given is None else given


class ChunkDelta(_Tolerant):
    """What an event adds to an answer."""

    content: str | None = None
    reasoning_content: str | None = None  # DeepSeek's name for it, llama.cpp's and older vLLM's
    reasoning: str | None = None  # vLLM's and OpenRouter's
    tool_calls: list[ToolCallPiece] | None = None


class _Logprobs(_Tolerant):
    """Of a chat, or the lists of a plain completion."""

    content: list[dict[str, Any]] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None

    def entries(self) -> list[dict[str, Any]]:
        """In a chat's form."""
        if self.content is not None or not self.tokens:
            return self.content or []
        tops = self.top_logprobs or [None] * len(self.tokens)
        return [
            _entry(token, logprob) | {"top_logprobs": [_entry(*one) for one in (top or {}).items()]}
            for token, logprob, top in zip(self.tokens, self.token_logprobs or (), tops, strict=False)
        ]


def _entry(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}


class Choice(_Tolerant):
    """A piece of one answer: of a chat in `delta`, of a plain completion in `text`."""

    index: int = 0
    delta: ChunkDelta = ChunkDelta()
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Cached(_Tolerant):
    cached_tokens: int | None = None


class _Reasoning(_Tolerant):
    reasoning_tokens: int | None = None


class Usage(_Tolerant):
    """Tokens, as the server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None
    completion_tokens_details: _Reasoning | None = None


class Chunk(_Tolerant):
    """One event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class OpenAIClient:
    """A client of one server. All its methods belong to one event loop. The key is never logged."""

    def __init__(self, base_url: str, key: str | None, *, timeout: float, connections: int) -> None:
        """`timeout`: seconds without a byte after which the server counts as hung."""
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT), pool=None),
            limits=httpx.Limits(max_connections=connections + 1, max_keepalive_connections=connections),
        )

    async def models(self) -> list[Model]:
        """The models the server offers. Raises ServerError."""
        async with _as_server_error():
            response = await self._http.get("models")
        if response.status_code != httpx.codes.OK:
            raise _error_of(response.status_code, response.headers, response.content)
        try:
            return _Models.model_validate_json(response.content).data
        except ValidationError as error:
            raise Malformed(f"its list of models is not one: {_short(error)}") from None

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of the answer to one request that is not streamed. Raises ServerError."""
        async with _as_server_error():
            response = await self._http.post(path, json=body)
        if response.status_code != httpx.codes.OK:
            raise _error_of(response.status_code, response.headers, response.content)
        try:
            return response.json()
        except ValueError as error:
            raise Malformed(f"it sent what is not JSON: {error}") from None

    async def complete(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The chunks of one streamed completion, of the endpoint at `path`. Closing the iterator tells the server to
        stop. Raises ServerError."""
        async with _as_server_error(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise _error_of(response.status_code, response.headers, await _read_error(response))
            done = False
            async for data in _events(response):
                done = done or data == b"[DONE]"
                if done:
                    continue  # to its end: then the connection can be used again
                try:
                    chunk = Chunk.model_validate_json(data)
                except ValidationError as error:
                    raise Malformed(f"it sent what is not a completion chunk: {_short(error)}") from None
                if chunk.error is not None:
                    raise Unavailable(f"it reports, in the stream: {_message(chunk.error)}")
                yield chunk

    async def close(self) -> None:
        await self._http.aclose()


@asynccontextmanager
async def _as_server_error() -> AsyncIterator[None]:
    """Turns failures to reach the server, or to read its answer, into ServerError."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"it cannot be reached ({str(error) or 'no answer'})") from None
    except httpx.TimeoutException:
        raise TimedOut("it went silent (PERLLM_OPENAI_TIMEOUT says how long it may be)") from None
    except httpx.HTTPError as error:
        raise Unavailable(f"the connection failed ({type(error).__name__}: {error})") from None


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of a stream of server-sent events, one line each."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_LINE:
            raise Malformed(f"it sent a line of more than {MAX_LINE} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _read_error(response: httpx.Response) -> bytes:
    """An error's body, as far as it is read."""
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > MAX_ERROR:
            break
    return body


def _error_of(status: int, headers: httpx.Headers, body: bytes) -> ServerError:
    try:
        said = _message(json.loads(body))
    except ValueError:
        said = body[:200].decode(errors="replace").strip()
    message = f"HTTP {status}: {' '.join(said.split()) or 'no reason given'}"
    if status in (408, 409, 425, 429) or status >= 500:
        return Unavailable(message, _retry_after(headers.get("retry-after")))
    return Refused(message, status)


def _message(error: Any) -> str:
    """The human part of an error document, whatever shape it has."""
    for key in ("error", "message", "detail"):
        if isinstance(error, dict) and key in error:
            error = error[key]
    return (error if isinstance(error, str) else json.dumps(error))[:300]


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a Retry-After header in seconds or as a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, wait) if wait < float("inf") else None


def _short(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
