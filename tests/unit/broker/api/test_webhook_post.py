"""Where a webhook may go, judged by the address that is connected to."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook
from support.api import Sink
from support.receivers import NameServer

from perllm.broker.api.webhooks import address as webhook_address
from perllm.broker.api.webhooks import post as webhook_post
from perllm.broker.api.webhooks.address import Address, Forbidden, check_url, permitted, resolve
from perllm.broker.api.webhooks.post import connections, post
from perllm.broker.api.webhooks.store import DeliveryDocument, WebhookDocument

SECRET = "whsec_" + "c2VjcmV0" * 4
LOOPBACK = ("127.0.0.0/8",)


def attempt(url: str, allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    hook = WebhookDocument(id="wh", tenant="t", created=0, url=url, events=[], secret=SECRET)
    delivery = DeliveryDocument(id="d", tenant="t", created=0, webhook="wh", event="e", event_id="evt", payload="{}")

    async def once() -> dict[str, Any]:
        async with connections(allowed) as pool:
            return await post(pool, hook, delivery)

    return asyncio.run(once())


# --- which addresses are public

V4, V6 = ipaddress.IPv4Address, ipaddress.IPv6Address
#: What Python calls global, or did in some version, and nobody should post to: blocks IANA lists for special purposes
#: that are routed all the same, embedded IPv4, space that is not given out, and Azure's host.
NOT_PUBLIC = [
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.175.48.0/24", "168.63.129.16/32",
        "::/8", "100::/8", "200::/7", "400::/6", "800::/5", "1000::/4", "2001::/23", "2001:db8::/32", "2002::/16",
        "2620:4f:8000::/48", "3fff::/20", "4000::/2", "8000::/1",
    )
]  # fmt: skip


def public(ip: Address) -> bool:
    """The same said independently: what Python calls global, less the above."""
    if isinstance(ip, V6):
        if ip.ipv4_mapped is not None:
            return public(ip.ipv4_mapped)
        last = V4(int(ip) % 2**32)
        if ip.exploded.startswith("0064:ff9b:0000:0000:0000:0000:"):
            return public(last)
        if ip.exploded[20:29] in ("0000:5efe", "0200:5efe") and not public(last):
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in block for block in NOT_PUBLIC)


#: Every way to put an IPv4 address into an IPv6 one.
EMBEDDED = {
    "mapped": lambda ip: 0xFFFF << 32 | ip,
    "compatible": lambda ip: ip,
    "translated": lambda ip: 0xFFFF << 48 | ip,
    "NAT64": lambda ip: 0x64FF9B << 96 | ip,
    "local NAT64": lambda ip: 0x64FF9B0001 << 80 | ip,
    "6to4": lambda ip: 0x2002 << 112 | ip << 80 | 1,
    "Teredo server": lambda ip: 0x20010000 << 96 | ip << 64,
    "Teredo client": lambda ip: 0x20010000 << 96 | (ip ^ 0xFFFFFFFF),
    "ISATAP": lambda ip: 0x2600 << 112 | 0x5EFE << 32 | ip,
    "ISATAP of a public one": lambda ip: 0x2600 << 112 | 0x02005EFE << 32 | ip,
}
v4 = st.ip_addresses(v=4).map(int)
boundaries = st.sampled_from(NOT_PUBLIC).flatmap(
    lambda n: st.sampled_from([int(n[0]) - 1, int(n[0]), int(n[-1]), int(n[-1]) + 1]).map(
        lambda number: type(n[0])(max(0, min(number, 2**n.max_prefixlen - 1)))
    )
)
embedded = st.builds(lambda form, ip: V6(form(ip)), st.sampled_from(list(EMBEDDED.values())), v4)


@settings(max_examples=1000)
@given(st.ip_addresses(v=4) | st.ip_addresses(v=6) | embedded | boundaries | st.integers(0, 2**128 - 1).map(V6))
def test_what_is_permitted_is_what_is_public(ip: Address) -> None:
    assert permitted(str(ip), ()) == public(ip)


@pytest.mark.parametrize("form", EMBEDDED)
@given(ip=st.ip_addresses(v=4).filter(lambda ip: not public(ip)))
def test_no_form_of_a_private_address_is_permitted(form: str, ip: ipaddress.IPv4Address) -> None:
    assert not permitted(str(ip), ())
    assert not permitted(str(V6(EMBEDDED[form](int(ip)))), ())


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b:1::1", "64:ff9b:1:ffff::8.8.8.8", "fec0::1", "feff::1", "::127.0.0.1", "::8.8.8.8",
        "::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8", "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::168.63.129.16",
        "169.254.169.254", "100.100.100.200", "fd00:ec2::254", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
        "ff02::1", "ff0e::1", "224.0.0.1", "255.255.255.255", "2001::1", "2001:1::1", "2002:808:808::1", "100::1",
        "2001:db8::1", "3fff::1", "5f00::1", "2600::5efe:10.0.0.1", "2600::200:5efe:127.0.0.1", "192.88.99.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not permitted(address, ())


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f:cb07::1", "8.8.8.8", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert permitted(address, ())


def test_what_is_allowed_is_permitted_but_for_metadata() -> None:
    allowed = ("10.0.0.0/8", "169.254.0.0/16", "fd00::/8", "168.63.129.0/24")
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "169.254.1.1", "fd00::1", "168.63.129.17"):
        assert permitted(address, allowed)
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "168.63.129.16", "::10.1.2.3"):
        assert not permitted(address, allowed)


# --- what a name stands for


def look_up(host: str, allowed: tuple[str, ...], server: NameServer) -> list[str]:
    return asyncio.run(resolve(host, 80, allowed, (server.address,)))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001"])
def test_every_spelling_of_this_machine_is_seen_through(host: str) -> None:
    with NameServer(lambda name, kind: ["127.0.0.1"] if kind == "A" else []) as server, pytest.raises(Forbidden):
        look_up(host, (), server)


def test_of_several_addresses_only_the_permitted_are_used() -> None:
    """As a name may have that tries both."""
    of = {"A": ["127.0.0.1", "93.184.215.14"], "AAAA": ["::ffff:10.0.0.1", "2606:2800:21f:cb07::1", "fd00::1"]}
    with NameServer(lambda name, kind: of[kind]) as server:
        assert look_up("both.example", (), server) == ["93.184.215.14", "2606:2800:21f:cb07::1"]


def test_names_inside_are_not_given_away() -> None:
    with NameServer(lambda name, kind: ["10.9.8.7"] if kind == "A" else []) as server:
        with pytest.raises(Forbidden) as refused:
            look_up("database.internal", (), server)
        assert "10.9.8.7" not in str(refused.value)
        assert look_up("database.internal", ("10.0.0.0/8",), server) == ["10.9.8.7"]


def test_one_kind_of_address_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are servers that never answer when asked for the other."""
    monkeypatch.setattr(webhook_address, "LOOKUP_TIMEOUT", 1.0)
    with NameServer(lambda name, kind: ["93.184.215.14"] if kind == "A" else None) as server:
        assert look_up("four.example", (), server) == ["93.184.215.14"]


@pytest.mark.parametrize("host", ["nobody.example", "a..b", "x" * 300, "-", "%00"])
def test_what_stands_for_nothing_is_refused(host: str) -> None:
    with NameServer(lambda name, kind: []) as server, pytest.raises(Forbidden, match="does not resolve"):
        look_up(host, (), server)


# --- one attempt


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
    monkeypatch.setattr(webhook_post, "ATTEMPT_TIMEOUT", 0.3)
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
