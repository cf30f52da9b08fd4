"""Every way to the server carries everything: ledger, Celery's queues, results and announcements."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis
from celery import chord
from support.cluster import Cluster
from support.ports import free_port
from support.servers import DebianRedis, skip_without_debian_redis
from support.wait import PATIENCE

from perllm.broker.connection import check
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import TaskSpec
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
    """An ACL user over TLS."""
    skip_without_debian_redis()
    key, certificate, port = folder / "key.pem", folder / "certificate.pem", free_port()
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject],
        check=True,
        capture_output=True,
    )
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    options += ["--tls-auth-clients", "no", "--user", "default", "off"]
    options += ["--user", "perllm", "on", f">{PASSWORD}", "~*", "&*", "+@all"]
    url = f"rediss://perllm:{QUOTED}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
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
        cluster.stop()
        for process in cluster.processes:
            assert PASSWORD not in process.output
            assert QUOTED not in process.output


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
