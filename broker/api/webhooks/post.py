"""One HTTP request to an address a user gave: signed, bounded in time, and never into a private network.

The address is checked when the connection is made, on what the name resolves to then, so a name that resolves otherwise
later gains nothing. Redirects are not followed, proxies of the environment not used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import httpcore
from standardwebhooks.webhooks import Webhook

from perllm.broker.api.webhooks.store import DeliveryDocument, WebhookDocument

#: Seconds one attempt may take in all.
PATIENCE = 15.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Forbidden(Exception):
    """The address is not one to post to."""


def check_url(url: str) -> None:
    """Raises Forbidden for what is no plain HTTP(S) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Forbidden(str(error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Forbidden("an http:// or https:// address is required")
    if parts.username or parts.password or parts.fragment:
        raise Forbidden("no user, password or fragment may be in it")
    if port == 0 or not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise Forbidden("it holds what no address holds")


def permitted(address: str, allowed: Sequence[str]) -> bool:
    """Whether an IP address is a public one, or in a network of `allowed`."""
    ip = _plain(ipaddress.ip_address(address.partition("%")[0]))
    if any(ip in ipaddress.ip_network(network) for network in allowed):
        return True
    return ip.is_global and not ip.is_multicast


def _plain(ip: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for: mapped, 6to4 (RFC 3056), NAT64 (RFC 6052) or Teredo (RFC 4380)."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
    if inside is None and ip in ipaddress.ip_network("64:ff9b::/96"):
        inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return inside or ip


async def resolve(host: str, port: int, allowed: Sequence[str]) -> list[str]:
    """The addresses of a host that may be posted to. Raises Forbidden when there is none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise Forbidden(f"{host} does not resolve") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    good = [address for address in addresses if permitted(address, allowed)]
    if not good:
        raise Forbidden(f"{host} resolves to {', '.join(addresses)}: private, loopback and link-local are not allowed")
    return good


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to permitted addresses only."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed
        self._real = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception | None = None
        for address in await resolve(host, port, self._allowed):
            try:
                return await self._real.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise Forbidden("no Unix sockets")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def post(hook: WebhookDocument, delivery: DeliveryDocument, allowed: Sequence[str]) -> dict[str, Any]:
    """Make one attempt. Returns what is to be noted of it: `error` is None where it was accepted (2xx)."""
    began = time.monotonic()
    status: int | None = None
    try:
        async with asyncio.timeout(PATIENCE):
            status = await _post(hook, delivery, allowed)
        error = None if 200 <= status < 300 else f"HTTP {status}"
    except TimeoutError:
        error = f"no answer in {PATIENCE:g} s"
    except Forbidden as refused:
        error = str(refused)
    except Exception as failure:  # whatever the other side does, the attempt has failed
        error = f"{type(failure).__name__}: {str(failure)[:200]}"
    return {"at": time.time(), "status": status, "error": error, "took": round(time.monotonic() - began, 3)}


async def _post(hook: WebhookDocument, delivery: DeliveryDocument, allowed: Sequence[str]) -> int:
    check_url(hook.url)
    now = datetime.now(UTC)
    headers: dict[bytes | str, bytes | str] = {
        "Host": urlsplit(hook.url).netloc,
        "Content-Type": "application/json",
        "User-Agent": "PerLLM",
        "webhook-id": delivery.event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(hook.secret).sign(delivery.event_id, now, delivery.payload),
    }
    async with (
        httpcore.AsyncConnectionPool(network_backend=_Checked(allowed)) as pool,
        pool.stream("POST", hook.url, headers=headers, content=delivery.payload.encode()) as answer,
    ):
        return answer.status  # what it says beyond that nobody wants to know
