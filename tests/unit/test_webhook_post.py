"""Where a webhook may go, judged by the address that is connected to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook
from support.api import Sink

from perllm.broker.api.webhooks import post as webhook_post
from perllm.broker.api.webhooks.post import Forbidden, check_url, permitted, post, resolve
from perllm.broker.api.webhooks.store import DeliveryDocument, WebhookDocument

SECRET = "whsec_" + "c2VjcmV0" * 4
LOOPBACK = ("127.0.0.0/8",)


def attempt(url: str, allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    hook = WebhookDocument(id="wh", tenant="t", created=0, url=url, events=[], secret=SECRET)
    delivery = DeliveryDocument(id="d", tenant="t", created=0, webhook="wh", event="e", event_id="evt", payload="{}")
    return asyncio.run(post(hook, delivery, allowed))


PRIVATE = [
    "10.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "0.0.0.0/8",
    "100.64.0.0/10",
]


@given(st.sampled_from(PRIVATE), st.integers(0, 2**32))
def test_no_form_of_a_private_address_is_permitted(network: str, number: int) -> None:
    net = ipaddress.ip_network(network)
    ip = int(net[number % net.num_addresses])
    forms = [
        ipaddress.IPv4Address(ip),
        ipaddress.IPv6Address((0xFFFF << 32) | ip),  # mapped
        ipaddress.IPv6Address((0x2002 << 112) | (ip << 80)),  # 6to4
        ipaddress.IPv6Address((0x0064FF9B << 96) | ip),  # NAT64
    ]
    for form in forms:
        assert not permitted(str(form), ())
        assert permitted(str(form), (network,))


@pytest.mark.parametrize("address", ["::1", "::", "fe80::1", "fc00::1", "ff02::1", "224.0.0.1", "255.255.255.255"])
def test_other_addresses_that_are_not_public(address: str) -> None:
    assert not permitted(address, ())


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07::1", "8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert permitted(address, ())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f000001", "017700000001"])
def test_every_spelling_of_this_machine_is_seen_through(host: str) -> None:
    with pytest.raises(Forbidden):
        asyncio.run(resolve(host, 80, ()))


def test_of_several_addresses_only_the_permitted_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a name may have that tries both."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("127.0.0.1", "93.184.215.14")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert asyncio.run(resolve("both.example", 80, ())) == ["93.184.215.14"]


@pytest.mark.parametrize("url", ["ftp://a/", "http://", "http://a:0/", "http://u@a/", "http://a/#x", "http://a b/"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(Forbidden):
        check_url(url)


def test_a_private_receiver_is_never_contacted() -> None:
    with Sink("127.0.0.1", 200) as sink:
        noted = attempt(sink.url.replace("127.0.0.1", "localhost"))
        assert "not allowed" in noted["error"]
        assert sink.received == []
        assert attempt(sink.url, LOOPBACK)["status"] == 200
    ((headers, body),) = sink.received
    assert Webhook(SECRET).verify(body, headers) == {}
    assert headers["host"] == sink.url.split("/")[2]


@pytest.mark.parametrize(("status", "good"), [(204, True), (302, False), (404, False), (410, False), (500, False)])
def test_only_a_2xx_is_a_delivery(status: int, good: bool) -> None:
    with Sink("127.0.0.1", status) as sink:
        noted = attempt(sink.url, LOOPBACK)
    assert (noted["error"] is None) is good
    assert noted["status"] == status
    assert len(sink.received) == 1


def test_a_receiver_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_post, "PATIENCE", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        noted = attempt(f"http://127.0.0.1:{silent.getsockname()[1]}/", LOOPBACK)
    assert "no answer" in noted["error"]


def test_nobody_listening_is_a_failed_attempt() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert "Connect" in attempt(f"http://127.0.0.1:{port}/", LOOPBACK)["error"]
