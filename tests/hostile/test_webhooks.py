"""Webhooks as a hostile tenant gives them: receivers that hang, lie and flood, names that change."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks.webhooks import Webhook
from support.api import ApiProcess, Sink
from support.receivers import NameServer, Receiver, accept, tarpit
from support.wait import eventually

from perllm.broker.api.store import ApiStore
from perllm.broker.api.webhooks import post as webhook_post
from perllm.broker.api.webhooks import store as webhook_store
from perllm.broker.api.webhooks.address import LOOKUP_TIMEOUT
from perllm.broker.api.webhooks.health import MAX_FAILURES, Health
from perllm.broker.api.webhooks.leases import MAX_LEASES
from perllm.broker.api.webhooks.post import MAX_ANSWER, connections, post
from perllm.broker.api.webhooks.store import MAX_WEBHOOKS, DeliveryDocument, WebhookDocument, Webhooks
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer

SECRET = "whsec_" + "c2VjcmV0" * 4
#: Where receivers are allowed; 127.0.0.1, where they must never be reached, is not.
ALLOWED = ("127.0.0.2/32",)


def attempt(url: str, server: NameServer | None = None) -> dict[str, Any]:
    hook = WebhookDocument(id="wh", tenant="t", created=0, url=url, events=[], secret=SECRET)
    delivery = DeliveryDocument(id="d", tenant="t", created=0, webhook="wh", event="e", event_id="evt", payload="{}")

    async def once() -> dict[str, Any]:
        async with connections(ALLOWED, (server.address,) if server else ()) as pool:
            return await post(pool, hook, delivery)

    return asyncio.run(once())


# --- one attempt: names that change


def changing(*addresses: str) -> Callable[[str, str], list[str]]:
    """Says another address each time it is asked, the last one for good."""
    left = list(addresses)
    return lambda name, kind: [left.pop(0) if len(left) > 1 else left[0]] if kind == "A" else []


def test_what_is_connected_to_is_what_was_checked() -> None:
    """The name is asked for once per connection. Whatever it would say the second time leads nowhere."""
    with Receiver(accept) as good, NameServer(changing("127.0.0.2", "127.0.0.1")) as names:
        inside = socket.create_server(("127.0.0.1", good.port))
        noted = attempt(f"http://rebind.example:{good.port}/hook", names)
        assert noted["status"] == 204
        assert sorted(names.asked) == [("rebind.example", "A"), ("rebind.example", "AAAA")]
        assert f"Host: rebind.example:{good.port}".encode() in good.heads[0]
        again = attempt(f"http://rebind.example:{good.port}/hook", names)
        assert "not allowed" in again["error"]
        inside.settimeout(0)
        with pytest.raises(BlockingIOError):
            inside.accept()
        inside.close()


def test_a_webhook_whose_name_is_turned_inside_after_its_check(running: ApiProcess, names: Names) -> None:
    """The same through the whole system."""
    names.say["turned.example"] = ["127.0.0.2"]
    with Sink("127.0.0.1", 200) as inside, running.http("rebinder") as http:
        url = inside.url.replace("127.0.0.1", "turned.example")
        hook = make_hook(http, url)
        names.say["turned.example"] = ["127.0.0.1"]
        succeed(running, "rebinder", 1)
        attempts = eventually(lambda: logged(http, hook), "it is tried")
        assert "not allowed" in attempts[0]["error"]
        assert inside.received == []


def test_neither_redirects_nor_proxies_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver(accept) as elsewhere:

        def redirect(connection: socket.socket, head: bytes) -> None:
            answer = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {elsewhere.url}\r\nContent-Length: 0\r\n\r\n"
            connection.sendall(answer.encode())

        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, elsewhere.url)
        with Receiver(redirect) as first:
            assert attempt(first.url)["error"] == "HTTP 307"
            assert len(first.heads) == 1
        assert elsewhere.heads == []


def test_tls_is_spoken_to_the_name_not_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=hook.example", "-addext", "subjectAltName=DNS:hook.example"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    greeted: list[str | None] = []
    context.sni_callback = lambda there, name, whole: greeted.append(name)  # type: ignore[assignment]
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    webhook_post._tls.cache_clear()
    try:
        with Receiver(accept, tls=context) as sink, NameServer(changing("127.0.0.2")) as names:
            noted = attempt(f"https://hook.example:{sink.port}/", names)
            assert noted["status"] == 204, noted
            assert greeted == ["hook.example"]
            assert f"Host: hook.example:{sink.port}".encode() in sink.heads[0]
            other = attempt(f"https://other.example:{sink.port}/", names)  # the certificate is for another name
            assert "certificate" in other["error"].lower()
    finally:
        webhook_post._tls.cache_clear()


# --- one attempt: answers without an end

HEAD = b"HTTP/1.1 200 OK\r\n"


def endless(start: bytes, piece: bytes, pause: float = 0) -> Callable[[socket.socket, bytes], None]:
    def serve(connection: socket.socket, head: bytes) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return serve


CHUNK = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
ENDLESS = {
    "one header": (endless(HEAD + b"X: ", b"x" * 65_536), None),
    "headers": (endless(HEAD, b"X: y\r\n" * 10_000), None),
    "status line": (endless(b"HTTP/1.1 ", b"2" * 65_536), None),
    "interim answers": (endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000), None),
    "body": (endless(HEAD + b"\r\n", b"x" * 65_536), 200),
    "chunks": (endless(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK), 200),
    "chunk extension": (endless(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;", b"x" * 65_536), 200),
    "trailers": (endless(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n" * 10_000), 200),
    "dripped header": (endless(HEAD + b"X: ", b"x", 0.05), None),
    "dripped interim answers": (endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05), None),
    "dripped body": (endless(HEAD + b"\r\n", b"x", 0.05), 200),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_answer_without_an_end_takes_neither_time_nor_memory(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_post, "ATTEMPT_TIMEOUT", 1.0)
    monkeypatch.setattr(webhook_post, "BODY_TIMEOUT", 0.2)
    serve, status = ENDLESS[what]
    with Receiver(serve) as flood:
        attempt(flood.url)  # so that what is loaded once is not counted
        tracemalloc.start()
        began = time.monotonic()
        noted = attempt(flood.url)
        took, most = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert noted["status"] == status  # one that came before the flood counts
    assert (noted["error"] is None) is (status == 200)
    assert took < 10
    assert most < 10 * MAX_ANSWER


# --- many of them: the whole system


class Names:
    """What the system's DNS server says: `say`; of names that end in .silent it says nothing at all."""

    def __init__(self) -> None:
        self.say: dict[str, list[str]] = {}
        self.server = NameServer(self.answer)

    def answer(self, name: str, kind: str) -> list[str] | None:
        if name.endswith(".silent"):
            return None
        return self.say.get(name, []) if kind == "A" else []


@pytest.fixture(scope="module")
def names() -> Iterator[Names]:
    known = Names()
    with known.server:
        yield known


@pytest.fixture(scope="module")
def running(names: Names, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("hooks")
    given = {"webhook_allow": '["127.0.0.2/32"]', "webhook_dns": f'["{names.server.address}"]'}
    with EmbeddedServer(folder) as server, ApiProcess(server.url, folder, webhooks=server.url, **given) as api:
        yield api


def make_hook(http: httpx.Client, url: str) -> dict[str, Any]:
    made = http.post("/v1/webhooks", json={"url": url, "events": ["task.succeeded"]})
    assert made.status_code == 200, made.text
    return dict(made.json())


_numbers = count()


def succeed(api: ApiProcess, tenant: str, number: int) -> None:
    """So many tasks of this tenant's have succeeded."""
    hooks = Webhooks(api.store, api.ledger)
    for _ in range(number):
        subject = f"task-{next(_numbers)}"
        hooks.add_event(tenant, "task.succeeded", subject, {"id": subject})


def logged(http: httpx.Client, hook: dict[str, Any]) -> list[dict[str, Any]]:
    deliveries = http.get(f"/v1/webhooks/{hook['id']}/deliveries", params={"limit": 100}).json()["data"]
    return [attempt for delivery in deliveries for attempt in delivery["attempts"]]


def test_silent_name_servers_keep_nobody_else_waiting(running: ApiProcess) -> None:
    hostile, other = running.http("namer"), running.http("neighbour")
    other.get("/v1/webhooks")
    statuses: list[int] = []

    def name(n: int) -> None:
        statuses.append(hostile.post("/v1/webhooks", json={"url": f"http://h{n}.silent/"}).status_code)

    threads = [threading.Thread(target=name, args=(n,)) for n in range(40)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    eventually(lambda: 429 in statuses, "the lookups are under way, and they are counted")
    worst = 0.0
    while any(thread.is_alive() for thread in threads):
        asked = time.monotonic()
        assert other.get("/v1/webhooks").status_code == 200
        assert other.get("/v1/nodes").status_code == 200
        worst = max(worst, time.monotonic() - asked)
    assert set(statuses) <= {400, 429}
    assert statuses.count(400) >= 4
    assert time.monotonic() - began < LOOKUP_TIMEOUT + 15
    assert worst < LOOKUP_TIMEOUT / 2  # what waits for a lookup waits for all of it


def test_a_receiver_that_hangs_delays_nobody_else(running: ApiProcess) -> None:
    """Six tarpits of one tenant with 600 deliveries, and a neighbour."""
    hostile, other = running.http("tar"), running.http("prompt")
    with Receiver(tarpit) as tar, Sink("127.0.0.2", 204) as sink:
        hooks = [make_hook(hostile, f"{tar.url}/{n}") for n in range(6)]
        good = make_hook(other, sink.url)
        succeed(running, "tar", 100)
        eventually(lambda: len(tar.heads) >= 6, "the tarpits have their requests")
        waited = []
        for n in range(1, 11):
            succeed(running, "prompt", 1)
            told = time.monotonic()
            eventually(lambda n=n: len(sink.received) == n, "the neighbour is told")  # type: ignore[misc]
            waited.append(time.monotonic() - told)
        assert sorted(waited)[5] < 3  # typically a quarter of a second
        assert len(running.store.client.keys("webhooks")) == 0  # nothing waits in the queue
        assert [Webhook(good["secret"]).verify(body, headers)["type"] for headers, body in sink.received]
        for hook in hooks:
            eventually(lambda hook=hook: state(hostile, hook) == "open", "its circuit is open")  # type: ignore[misc]
        shown = hostile.get(f"/v1/webhooks/{hooks[0]['id']}").json()
        assert "no answer" in shown["reason"]
        assert shown["next_probe"] > time.time()
        assert tar.most_at_once <= 2 * 6
        assert len(tar.ids()) == len(tar.heads) <= 5 * 6  # of 600: two at once, then a probe at a time
        for hook in hooks:
            hostile.delete(f"/v1/webhooks/{hook['id']}")
        assert not any(running.store.client.keys(f"*api:deliveries-due:{hook['id']}") for hook in hooks)


def state(http: httpx.Client, hook: dict[str, Any]) -> str:
    return str(http.get(f"/v1/webhooks/{hook['id']}").json()["health"])


def test_a_receiver_that_comes_back_gets_all_that_waited_once(running: ApiProcess) -> None:
    http = running.http("mended")
    with Sink("127.0.0.2", *[500] * 6, 204) as sink:
        hook = make_hook(http, sink.url)
        succeed(running, "mended", 50)
        eventually(lambda: state(http, hook) == "open", "it has failed too often")
        assert len(sink.received) == 6  # two at once
        assert http.get(f"/v1/webhooks/{hook['id']}").json()["reason"] == "HTTP 500"
        enabled = http.post(f"/v1/webhooks/{hook['id']}/enable").json()
        assert (enabled["health"], enabled["reason"]) == ("closed", None)
        good = eventually(lambda: [a for a in logged(http, hook) if a["status"] == 204], "deliveries go out again")
        assert good
        eventually(lambda: len({h["webhook-id"] for h, _ in list(sink.received)}) == 50, "all go out")
        again = [h["webhook-id"] for h, _ in sink.received[6:]]
        assert len(again) == len(set(again))  # and once
        assert state(http, hook) == "closed"


def test_messages_of_leases_that_nobody_reads_do_not_pile_up(valkey: EmbeddedServer, tmp_path: Path) -> None:
    """Without a worker that delivers, the queue has the first leases' messages, and nothing is added to them."""
    with ApiProcess(valkey.url, tmp_path, webhook_allow='["127.0.0.2/32"]') as api:
        hooks = Webhooks(api.store, api.ledger)
        api.store.client.flushall()
        for tenant in range(3 * MAX_LEASES):
            assert hooks.make(f"t{tenant}", "http://127.0.0.2:9/", ["task.succeeded"])
            hooks.add_event(f"t{tenant}", "task.succeeded", "x", {})
        eventually(lambda: api.store.client.llen("webhooks") == MAX_LEASES, "as many as may have a lease")
        leases = api.store.key("webhook-leases")
        for _ in range(3):
            with suppress(ValueError):
                api.store.client.delete(leases)  # their time is over
            assert hooks.grant_leases() == []
        assert api.store.client.llen("webhooks") == MAX_LEASES


# --- what is kept is bounded, and comes back


@pytest.fixture
def hooks(ledger: Ledger, store: ApiStore) -> Webhooks:
    return Webhooks(store, ledger)


def made(hooks: Webhooks, tenant: str = "t") -> WebhookDocument:
    hook = hooks.make(tenant, "http://example.com", ["task.failed"])
    assert hook is not None
    return hook


def attempted(error: str | None, took: float = 0.1) -> dict[str, Any]:
    return {"at": 0.0, "status": None, "error": error, "took": took}


def all_keys(hooks: Webhooks, pattern: str) -> list[bytes]:
    return list(hooks._client.keys(f"*{pattern}"))


def test_pending_and_final_deliveries_are_bounded(hooks: Webhooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_store, "MAX_PENDING", 20)
    monkeypatch.setattr(webhook_store, "MAX_FINAL", 5)
    hook, second = made(hooks), made(hooks)
    for n in range(30):
        hooks.add_event("t", "task.failed", f"task-{n}", {"id": n})
    assert len(all_keys(hooks, "api:delivery:*")) == 20
    assert hooks.dropped([hook, second]) == [20, 20]
    hooks.add_event("t", "task.failed", "task-1", {"id": 1})  # it was told already
    assert hooks.dropped([hook]) == [20]
    lease = next(t for t in hooks.grant_leases() if t.webhook == hook.id)
    while found := hooks.next_due(lease, 3):
        for delivery in found[1]:
            hooks.record_attempt(hook, delivery, attempted(None), retry_in=None)
    assert len(all_keys(hooks, "api:delivery:*")) == 10 + 5
    assert len(hooks.deliveries.page(hook.id, after=None, limit=100)[0]) == 5
    for each in (hook, second):
        hooks.remove(each)
    assert all_keys(hooks, "api:deliver*") in ([], [hooks._final_key("t").encode()])


def test_a_payload_is_bounded_and_says_what_it_lacks(hooks: Webhooks) -> None:
    hook = made(hooks)
    hooks.add_event("t", "task.failed", "a", {"id": "a", "metadata": {"k": "ö" * 50_000}, "reason": "half \ud800"})
    ((delivery,), _) = hooks.deliveries.page(hook.id, after=None, limit=1)
    told = json.loads(delivery.payload)["data"]
    assert told == {"id": "a", "reason": "half ?", "omitted": ["metadata"]}


def test_no_more_webhooks_than_allowed_however_many_are_made_at_once(hooks: Webhooks) -> None:
    threads = [threading.Thread(target=hooks.make, args=("t", "http://example.com", [])) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(all_keys(hooks, "api:webhook:*")) <= MAX_WEBHOOKS


def test_a_lease_is_held_once_and_granted_again_when_lost(hooks: Webhooks, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = made(hooks)
    for n in range(3):
        hooks.add_event("t", "task.failed", f"task-{n}", {})
    monkeypatch.setattr(webhook_store, "LEASE_TIME", 1.0)
    (lost,) = hooks.grant_leases()
    assert hooks.grant_leases() == []
    (lease,) = eventually(hooks.grant_leases, "whoever had it is taken for dead")
    assert not hooks.holds(lost, 0)  # its message, read late, is void
    assert hooks.holds(lease, 0)
    hooks.release(lost)
    assert hooks.holds(lease, 0)
    found = hooks.next_due(lease, 10)
    assert found is not None
    assert len(found[1]) == 3
    hooks.release(lease)
    assert [t.webhook for t in hooks.grant_leases()] == [hook.id]  # there is more


def test_an_unreadable_record_keeps_nothing_else_from_being_delivered(hooks: Webhooks) -> None:
    hook, broken = made(hooks), made(hooks, "another")
    for n in range(3):
        hooks.add_event("t", "task.failed", f"task-{n}", {})
    hooks.add_event("another", "task.failed", "x", {})
    client = hooks._client
    client.set(hooks.documents.key(broken.id), b"{")
    client.set(all_keys(hooks, "api:delivery:*")[0], b'{"id": 1}')
    for lease in hooks.grant_leases():
        found = hooks.next_due(lease, 10)
        assert (found is None) is (lease.webhook == broken.id)
        hooks.release(lease)
    assert client.zrange(hooks._due, 0, -1) == [f"{hook.id} t".encode()]


def test_a_webhook_that_failed_for_days_is_disabled_until_it_is_enabled(hooks: Webhooks) -> None:
    hook = made(hooks)
    hooks.add_event("t", "task.failed", "a", {})
    (lease,) = hooks.grant_leases()
    found = hooks.next_due(lease, 1)
    assert found is not None
    long_ago = Health(failures=MAX_FAILURES, since=1.0, pauses=3, until=1.0, reason="HTTP 500")
    hooks.documents.change(hook.id, lambda h: h.model_copy(update={"health": long_ago}))
    failing = hooks.documents.get(hook.id)
    assert failing is not None
    hooks.record_attempt(failing, found[1][0], attempted("HTTP 500"), retry_in=0.0)
    assert hooks.next_due(lease, 1) is None
    hooks.release(lease)
    disabled = hooks.documents.get(hook.id)
    assert disabled is not None
    assert disabled.health.disabled
    assert "HTTP 500" in str(disabled.health.reason)
    hooks.add_event("t", "task.failed", "b", {})
    assert hooks.grant_leases() == []
    hooks.enable(disabled)
    (lease,) = hooks.grant_leases()
    found = hooks.next_due(lease, 10)
    assert found is not None
    assert len(found[1]) == 1  # what had waited, and not what happened meanwhile
