"""One HTTP request to an address a user gave: signed, bounded in time and size, and never into a private network.

The address is checked when the connection is made, and that very address is connected to, so a name that resolves
otherwise later gains nothing. Redirects are not followed, proxies of the environment not used.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpcore
from standardwebhooks.webhooks import Webhook

from perllm.broker.api.webhooks.address import Forbidden, check_url, resolve
from perllm.broker.api.webhooks.store import DeliveryDocument, WebhookDocument

#: Seconds one attempt may take in all, and those of them that connecting to one of several addresses may take.
ATTEMPT_TIMEOUT, CONNECT_TIMEOUT = 15.0, 5.0
#: Bytes an answer may have.
MAX_ANSWER = 128 << 10
#: Seconds an answer's body, which is read only so that the connection can be used again, may take.
BODY_TIMEOUT = 1.0
#: Seconds an idle connection is kept for the next attempt.
KEEPALIVE = 1.0
#: Seconds an idle connection is kept for the next attempt.
KEEPALIVE = 1.0


class AnswerTooLong(Exception):
    """The answer is longer than any answer needs to be."""


class _BoundedStream(httpcore.AsyncNetworkStream):
    """A connection that ends when more than `MAX_ANSWER` bytes come in answer to one request."""

    def __init__(self, real: httpcore.AsyncNetworkStream) -> None:
        self._real, self._remaining = real, MAX_ANSWER

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._remaining <= 0:
            raise AnswerTooLong(f"the answer is longer than {MAX_ANSWER} bytes")
        data = await self._real.read(min(max_bytes, self._remaining), timeout)
        self._remaining -= len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._remaining = MAX_ANSWER
        await self._real.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._real.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _BoundedStream(await self._real.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._real.get_extra_info(info)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to permitted addresses only."""

    def __init__(self, allowed: Sequence[str], servers: Sequence[str]) -> None:
        self._allowed, self._servers = allowed, servers
        self._real = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002  the attempt has one
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception | None = None
        for address in await resolve(host, port, self._allowed, self._servers):
            try:
                return _BoundedStream(
                    await self._real.connect_tcp(address, port, CONNECT_TIMEOUT, local_address, socket_options)
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise Forbidden("no Unix sockets")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpcore.default_ssl_context()  # reads all certificates: once


def connections(allowed: Sequence[str], servers: Sequence[str] = ()) -> httpcore.AsyncConnectionPool:
    """Connections to public addresses and `allowed` networks, their names looked up at these DNS servers (none: the
    system's). To be used in one event loop, with `async with`."""
    return httpcore.AsyncConnectionPool(
        _tls(), network_backend=_CheckedBackend(allowed, servers), keepalive_expiry=KEEPALIVE
    )


async def post(
    pool: httpcore.AsyncConnectionPool, webhook: WebhookDocument, delivery: DeliveryDocument
) -> dict[str, Any]:
    """Make one attempt. Returns what is to be recorded of it: `error` is None where it was accepted (2xx)."""
    began = time.monotonic()
    status: int | None = None
    try:
        async with asyncio.timeout(ATTEMPT_TIMEOUT):
            status = await _post(pool, webhook, delivery)
        error = None if 200 <= status < 300 else f"HTTP {status}"
    except TimeoutError:
        error = f"no answer in {ATTEMPT_TIMEOUT:g} s"
    except Forbidden as refused:
        error = str(refused)
    except Exception as failure:  # whatever the other side does, the attempt has failed
        error = f"{type(failure).__name__}: {str(failure)[:200]}"
    return {"at": time.time(), "status": status, "error": error, "took": round(time.monotonic() - began, 3)}


async def _post(pool: httpcore.AsyncConnectionPool, webhook: WebhookDocument, delivery: DeliveryDocument) -> int:
    check_url(webhook.url)
    now = datetime.now(UTC)
    headers: dict[bytes | str, bytes | str] = {
        "Host": urlsplit(webhook.url).netloc,
        "Content-Type": "application/json",
        "User-Agent": "PerLLM",
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(webhook.secret).sign(delivery.event_id, now, delivery.payload),
    }
    async with pool.stream("POST", webhook.url, headers=headers, content=delivery.payload.encode()) as answer:
        with suppress(TimeoutError, AnswerTooLong, httpcore.NetworkError, httpcore.ProtocolError):
            async with asyncio.timeout(BODY_TIMEOUT):  # only the status matters
                async for _ in answer.aiter_stream():
                    pass
        return answer.status
