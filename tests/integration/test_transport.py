"""Every way to the server carries everything: ledger, Celery's queues, results and announcements."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import celery
import kombu
import pytest
import redis
from celery import chord
from celery.events import EventReceiver
from support.cluster import Cluster
from support.ports import free_port
from support.proxy import Proxy
from support.raw import redis_of
from support.servers import DebianRedis, skip_without_debian_redis
from support.wait import PATIENCE, eventually

from perllm.broker.celery import KEPT
from perllm.broker.connection import check
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import TaskSpec
from perllm.broker.queues.app import node_message
from perllm.broker.queues.events import Dispatcher
from perllm.broker.queues.transport import NodeTransport, Transport, _QoS
from perllm.broker.settings import Settings

PASSWORD = "p@ss:w/rd?#%"  # each of these means something in a URL
QUOTED = "p%40ss%3Aw%2Frd%3F%23%25"


@contextmanager
def acl_user(folder: Path) -> Iterator[str]:
    """A user with a name and a password, on a port of the embedded server."""
    with EmbeddedServer(folder, free_port()) as server, redis.Redis.from_url(server.url) as admin:
        admin.acl_setuser(
            "perllm", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", channels="*", commands=["+@all"]
        )
        yield f"redis://perllm:{QUOTED}@127.0.0.1:{server.port}/3"


@contextmanager
def tls(folder: Path) -> Iterator[str]:
    """An ACL user over TLS, the server's certificate signed by a CA of one's own."""
    skip_without_debian_redis()
    authority, key, certificate, port = folder / "ca.pem", folder / "key.pem", folder / "certificate.pem", free_port()
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for command in (
        [*new, "-keyout", folder / "ca.key", "-out", authority, "-subj", "/CN=Ours"],
        [*new, "-keyout", folder / "other.key", "-out", folder / "other.pem", "-subj", "/CN=Another"],
        [
            *new,
            "-keyout",
            key,
            "-out",
            certificate,
            "-subj",
            "/CN=redis",
            "-CA",
            authority,
            "-CAkey",
            folder / "ca.key",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ],
    ):
        subprocess.run(command, check=True, capture_output=True)
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    options += ["--tls-auth-clients", "no", "--user", "default", "off"]
    options += ["--user", "perllm", "on", f">{PASSWORD}", "~*", "&*", "+@all"]
    url = f"rediss://perllm:{QUOTED}@127.0.0.1:{port}/0?ssl_ca_certs={authority}"
    with DebianRedis(folder, options, url):
        yield url


@contextmanager
def odd_path(folder: Path) -> Iterator[str]:
    """A socket whose path means something in a URL."""
    with EmbeddedServer(folder / "a b#c%20?ü") as server:
        yield server.url


@pytest.mark.parametrize("way", [acl_user, tls, odd_path])
def test_a_task_goes_the_whole_way(way: Callable[[Path], Iterator[str]], tmp_path: Path) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(way(tmp_path))  # type: ignore[arg-type]
        cluster = stack.enter_context(Cluster(url, tmp_path))
        cluster.start_inbox()
        cluster.scheduler()
        cluster.start_nodes("a")
        generate = cluster.producer().signature("perllm.generate", kwargs={"max_tokens": 1}, queue="inbox")
        joined = chord([generate.clone(args=[text]) for text in ("hi", "ho")], generate.clone())()
        assert joined.get(timeout=PATIENCE)["state"] == "succeeded"
        assert cluster.task(joined.id).spec.prompt == "word\n\nword"
        if url.startswith("rediss:"):
            flower_shows_the_queues(cluster)
            with pytest.raises(Unreachable, match=r"the certificate of the server at rediss://127.* is not trusted"):
                check(Settings.model_validate({"redis_url": url.replace("/ca.pem", "/other.pem")}))
        cluster.stop()
        for process in cluster.processes:
            assert PASSWORD not in process.output
            assert QUOTED not in process.output


def flower_shows_the_queues(cluster: Cluster) -> None:
    port = free_port()
    flower = cluster.start("flower", "perllm.broker.local.flower", "--address=127.0.0.1", f"--port={port}")

    def shown() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/broker", timeout=PATIENCE) as page:
            text = page.read().decode()
            return all(f"<td>{queue}</td>" in text for queue in ("edge.a", "inbox"))
        return False

    cluster.watch(flower, shown, "shows the queues")


def test_a_user_who_may_not(tmp_path: Path) -> None:
    """Neither what the user may not call, nor keys the function may not touch, ends in anything but one line."""
    with EmbeddedServer(tmp_path, free_port()) as server, redis.Redis.from_url(server.url) as admin:
        url = f"redis://less:pw@127.0.0.1:{server.port}"
        settings = Settings(redis_url=url)
        ledger = Ledger(settings)
        for commands, keys in (["+@all", "-fcall"], ["*"]), (["+@all"], ["elsewhere:*"]):
            admin.acl_setuser("less", enabled=True, reset=True, passwords=["+pw"], commands=commands, keys=keys)
            check(settings)
            with pytest.raises(
                Unreachable, match=r"the user in PERLLM_REDIS_URL may not do this at redis://127\.0\.0\.1"
            ):
                ledger.submit([("t", TaskSpec(prompt="hi"))])
        assert admin.dbsize() == 0


def test_one_trip_to_the_server_brings_as_many_messages_as_there_are_places(ledger: Ledger) -> None:
    """One at a time, a worker's rate would be bound by the way there and back. What is no message takes no place."""
    for number in range(25):
        redis_of(ledger).lpush("edge.far", "no message" if number == 5 else node_message(f"t{number}", 1, "edge.far"))
    taken: list[kombu.Message] = []
    with kombu.Connection(ledger.settings.celery_url) as connection:
        connection.transport_cls = NodeTransport
        consumer = kombu.Consumer(
            connection.default_channel,
            [kombu.Queue("edge.far")],
            on_message=taken.append,
            prefetch_count=10,
            auto_declare=False,
        )
        with consumer:
            sent = [f"t{number}" for number in range(25) if number != 5]
            for trip in sent[:9], sent[:10]:  # the first brings ten, one of them none
                connection.drain_events(timeout=PATIENCE)
                assert [message.headers["id"] for message in taken] == trip
            for message in taken:
                message.ack()
            connection.drain_events(timeout=PATIENCE)
            assert [message.headers["id"] for message in taken] == sent[:20]


def test_what_a_killed_inbox_had_moved_and_not_noted_goes_back(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    server, taken = redis_of(ledger), list[kombu.Message]()

    def die(*_: object) -> None:
        raise SystemExit

    def consume_one() -> None:
        with kombu.Connection(ledger.settings.celery_url, transport_options=KEPT) as connection:
            connection.transport_cls = Transport
            queues = [kombu.Queue("inbox")]
            consumer = kombu.Consumer(connection.default_channel, queues, on_message=taken.append, auto_declare=False)
            with consumer:
                connection.default_channel.qos.restore_visible()
                connection.drain_events(timeout=PATIENCE)
                assert server.zcard("inbox:takers") == 1
                assert (server.hlen("inbox:unacked"), server.keys("inbox:taken:*")) == (1, [])
                taken[0].ack()

    server.lpush("inbox\x06\x163", node_message("t", 1, "inbox"))
    with monkeypatch.context() as patch:
        patch.setattr(_QoS, "_note", die)
        with pytest.raises(SystemExit):
            consume_one()
    (left,) = server.zrange("inbox:takers", 0, -1)
    assert server.llen(left) == 1
    server.zadd("inbox:takers", {left: 0})
    server.delete("inbox:unacked_mutex")
    consume_one()
    assert [message.headers["id"] for message in taken] == ["t"]
    assert sorted(server.keys("inbox*")) == [b"inbox:takers", b"inbox:unacked_mutex"]


def test_who_makes_an_event_never_waits_for_the_server(server: EmbeddedServer | DebianRedis) -> None:
    """Else a worker would begin no more tasks than there are ways there and back in a second."""
    with Proxy(server.url) as proxy:
        app = celery.Celery(broker=Settings(redis_url=proxy.url).celery_url)
        near = celery.Celery(broker=Settings(redis_url=server.url).celery_url)
        heard: list[str] = []
        with near.connection() as connection, app.connection() as far:
            receiver = EventReceiver(
                connection, handlers={"task-received": lambda event: heard.append(event["uuid"])}, app=near
            )
            with receiver.consumer_context() as (listening, *_):
                dispatcher = Dispatcher(far, buffer_group=["task"], app=app)

                def subscribed() -> list[str]:
                    dispatcher.send("task-received", uuid="first")
                    drain(listening)
                    return heard

                eventually(subscribed, "the first is heard")
                proxy.hold()
                sent = [f"t{number}" for number in range(500)]
                for uuid in sent:  # none of these returns while the server must be waited for, if it is waited for
                    dispatcher.send("task-received", uuid=uuid)
                proxy.let_through()
                eventually(lambda: drain(listening) or sent[-1] in heard, "the last is heard")
                assert [uuid for uuid in heard if uuid != "first"] == sent
                dispatcher.close()


def drain(connection: kombu.Connection) -> None:
    """Handle the events there are."""
    with suppress(TimeoutError):
        connection.drain_events(timeout=0.05)
