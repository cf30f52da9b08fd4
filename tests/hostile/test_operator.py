"""What a clumsy operator does, and what others may do to the system on his machine: wrong addresses, a full disk, web
pages that reach Flower, links laid in the data folder, clocks that are set while all is running."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from support.cluster import Cluster, Process
from support.ports import free_port
from support.raw import redis_of
from support.wait import eventually
from tornado.httputil import HTTPHeaders

from perllm.broker.client import AsyncClient, Client
from perllm.broker.connection import check
from perllm.broker.errors import BadSetting, PerLLMError, Unreachable
from perllm.broker.local.flower import from_here
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.local.supervisor import Supervisor
from perllm.broker.private_files import own_folder, write_own
from perllm.broker.settings import Settings

PERLLM = str(Path(sys.executable).with_name("perllm"))

# --- addresses that lead to no server of ours


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server on a port, without TLS."""
    with EmbeddedServer(tmp_path_factory.mktemp("plain"), free_port()) as server:
        yield server


def refusal(url: str) -> str:
    """What a service is told of this address, and that every kind of producer is told the same; in bounded time."""
    settings = Settings.model_validate({"redis_url": url})

    async def await_one() -> None:
        async with AsyncClient(url) as client:
            await client.status("t")

    def ask() -> None:
        with Client(url) as client:
            client.status("t")

    said = set[str]()
    for attempt in (lambda: check(settings), ask, lambda: asyncio.run(await_one())):
        began = time.monotonic()
        with pytest.raises(PerLLMError) as caught:
            attempt()  # type: ignore[no-untyped-call]
        assert time.monotonic() - began < 20
        assert "password" not in str(caught.value)
        said.add(str(caught.value))
    assert len(said) == 1
    return said.pop()


def test_a_database_that_is_not_there(plain: EmbeddedServer) -> None:
    assert "has no database 99: see its setting 'databases'" in refusal(plain.url.removesuffix("/0") + "/99")


def test_tls_to_a_port_without(plain: EmbeddedServer) -> None:
    began = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        check(Settings.model_validate({"redis_url": plain.url.replace("redis:", "rediss:")}))
    assert time.monotonic() - began < 20
    assert "no Redis server answers at rediss://127.0.0.1" in str(caught.value)
    assert "without TLS its address begins with redis://" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("ssl_ca_certs=/no/such.pem", "ssl_ca_certs: /no/such.pem: No such file or directory"),
        ("ssl_ca_certs=/etc/hostname", "ssl_ca_certs: /etc/hostname: "),
        ("ssl_ca_path=/no/such", "ssl_ca_path: /no/such: No such file or directory"),
        ("ssl_certfile=/no/such.pem", "ssl_certfile: /no/such.pem: No such file or directory"),
        ("ssl_keyfile=/no/such.pem", "ssl_keyfile: there is no ssl_certfile that it is the key of"),
    ],
)
def test_a_certificate_that_cannot_be_read_is_named(plain: EmbeddedServer, option: str, reason: str) -> None:
    with pytest.raises(BadSetting, match=f"^PERLLM_REDIS_URL: {reason}"):
        check(Settings.model_validate({"redis_url": f"{plain.url.replace('redis:', 'rediss:')}?{option}"}))


def test_a_web_server() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        assert "does not speak Redis's protocol" in refusal(f"redis://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_a_port_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Unreachable, match=f"no Redis server answers at {address}"):
            check(Settings.model_validate({"redis_url": address}))
        assert time.monotonic() - began < 20


@contextmanager
def old_server(version: str) -> Iterator[str]:
    """The URL of what says it is Redis of this version, and does nothing else."""

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as asked:
            while words := asked.readline():
                parts = [asked.readline() and asked.readline().strip() for _ in range(int(words[1:]))]
                match parts[0].upper():
                    case b"HELLO" if version >= "6":
                        pairs = {"server": "redis", "version": version, "proto": 3}
                        reply = f"%{len(pairs)}\r\n" + "".join(
                            f"+{k}\r\n" + (f":{v}\r\n" if isinstance(v, int) else f"+{v}\r\n") for k, v in pairs.items()
                        )
                    case b"INFO":
                        info = f"# Server\r\nredis_version:{version}\r\n"
                        reply = f"${len(info)}\r\n{info}\r\n"
                    case b"SELECT":
                        reply = "+OK\r\n"
                    case command:
                        reply = f"-ERR unknown command `{command.decode()}`, with args beginning with: \r\n"
                connection.sendall(reply.encode())

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("version", "named"), [("6.2.14", "is version 6.2.14; "), ("5.0.7", "is too old: ")])
def test_an_old_server_is_one_error_everywhere(version: str, named: str) -> None:
    with old_server(version) as url:
        assert f"{named}Redis 7.0 or Valkey 7.2 is needed" in refusal(url)


def test_every_entry_says_so_in_one_line(tmp_path: Path) -> None:
    module, celery = [sys.executable, "-m"], [sys.executable, "-W", "ignore", "-m", "celery", "-A"]
    entries = {
        "perllm": [PERLLM, "submit", "hi"],
        "scheduler": [*module, "scheduler"],
        "api": [*module, "perllm.broker.api"],
        "inbox": [*celery, "broker", "worker"],
        "edge": [*celery, "edge_worker", "worker"],
    }
    with old_server("6.2.14") as url:
        own = {"PERLLM_REDIS_URL": url, "PERLLM_DATA_DIR": str(tmp_path), "PERLLM_ENGINE": "emulated"}
        started = {
            name: subprocess.Popen(
                command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for name, command in entries.items()
        }
        for name, process in started.items():
            out, err = process.communicate(timeout=120)
            assert process.returncode in (1, 2), name
            assert "Traceback" not in out + err, name
            told = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(told) == 1, (name, err)
            assert "is version 6.2.14; Redis 7.0 or Valkey 7.2 is needed" in told[0]


# --- web pages that reach Flower


@pytest.mark.parametrize(
    ("method", "headers", "heard"),
    [
        ("GET", {"Host": "127.0.0.1:5555"}, True),
        ("POST", {"Host": "127.0.0.1:5555"}, True),  # the developer's own curl
        ("POST", {"Host": "localhost:9", "Origin": "http://localhost:9", "Sec-Fetch-Site": "same-origin"}, True),
        ("GET", {"Host": "[::1]:5555", "Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document"}, True),
        ("GET", {"Host": "127.0.0.1:5555", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, True),
        ("GET", {"Host": "127.0.0.1:5555", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"}, False),
        ("GET", {"Host": "127.0.0.1:5555", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"}, False),
        ("GET", {"Host": "127.0.0.1:5555", "Origin": "https://evil.example"}, False),
        ("POST", {"Host": "127.0.0.1:5555", "Origin": "https://evil.example"}, False),
        ("POST", {"Host": "127.0.0.1:5555", "Origin": "null"}, False),
        ("POST", {"Host": "127.0.0.1:5555", "Origin": "http://127.0.0.1:8000"}, False),
        ("POST", {"Host": "127.0.0.1:5555", "Sec-Fetch-Site": "same-site"}, False),
        ("POST", {"Host": "127.0.0.1:5555", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, False),
        ("GET", {"Host": "evil.example:5555"}, False),  # a name that leads here
        ("POST", {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}, False),
        ("GET", {"Host": "127.0.0.1.evil.example"}, False),
        ("GET", {"Host": "evil.example@127.0.0.1.evil.example"}, False),
        ("GET", {"Host": "[::1"}, False),
        ("GET", {}, False),
    ],
)
def test_flower_hears_what_comes_from_here(method: str, headers: dict[str, str], heard: bool) -> None:
    assert from_here(method, HTTPHeaders(headers)) is heard


def test_flower_takes_the_developers_commands_and_no_pages(valkey: EmbeddedServer, tmp_path: Path) -> None:
    port, evil = free_port(), {"Origin": "https://evil.example"}
    with Cluster(valkey.url, tmp_path) as cluster, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as web:
        redis_of(cluster.ledger).flushall()
        (node,) = cluster.start_nodes("a")
        os.environ["FLOWER_UNAUTHENTICATED_API"] = "true"
        try:
            flower = cluster.start("flower", "perllm.broker.local.flower", "--address=127.0.0.1", f"--port={port}")
        finally:
            del os.environ["FLOWER_UNAUTHENTICATED_API"]

        def knows() -> bool:
            try:
                return "a@test" in web.get("/api/workers?refresh=1").text
            except httpx.TransportError:
                return False

        cluster.watch(flower, knows, "knows the worker")
        for headers in (evil, {"Host": f"evil.example:{port}"}, {"Sec-Fetch-Site": "cross-site"}):
            for path in ("/api/worker/shutdown/a@test", "/api/task/revoke/x?terminate=true"):
                assert web.post(path, headers=headers).status_code == 403
        assert web.get("/api/workers", headers=evil).status_code == 403
        assert "Access-Control-Allow-Origin" not in web.get("/", headers=evil).headers
        assert node.running
        assert web.get("/").status_code == 200
        (task,) = cluster.submit()  # nobody schedules it
        assert web.post(f"/api/task/revoke/{task}").status_code == 200
        cluster.await_state(task, "cancelled")
        cluster.submit(3)
        queues = {q["name"]: q["messages"] for q in web.get("/api/queues/length").json()["active_queues"]}
        assert queues == {"edge.a": 0, "inbox": 0, "pending (ledger)": 3}
        assert all(name in web.get("/broker").text for name in queues)


# --- a full disk


FULL_DISK = """
import os, sys
from pathlib import Path
from support.wait import eventually
from perllm.broker.client import Client
from perllm.broker.errors import Unreachable
from perllm.broker.settings import Settings
from perllm.broker.local.supervisor import Supervisor

folder = Path(sys.argv[1])
emulated = {"PERLLM_ENGINE": "emulated", "PERLLM_SLOTS": "4", "PERLLM_EMULATED_SPEED": "50"}
settings = Settings.model_validate({"data_dir": folder / "data", "lease": 3})
lines = []
with Supervisor(settings, edges=("a", "b"), clouds=(), node_environment=dict.fromkeys("ab", emulated)) as stack:
    def tended(look):
        def both():
            lines.extend(stack.tend())
            return look()
        return both

    def submitted():
        try:
            with Client(stack.url) as client:
                return client.submit("hi", deadline=300, max_tokens=2).id
        except Unreachable:
            return None

    eventually(tended(lambda: not stack.waiting_for()), "all nodes are up")
    with Client(stack.url) as client:
        accepted = [client.submit("hi", deadline=300, max_tokens=n).id for n in (100, 200, 10)]
    with (folder / "fill").open("wb", buffering=0) as fill:
        try:
            while fill.write(bytes(4096)):
                pass
        except OSError:
            pass

    def refused():
        try:
            with Client(stack.url) as client:
                client.submit("hi", deadline=300, max_tokens=2)
        except Unreachable as error:
            return "cannot write to its disk" in str(error)

    # What is acknowledged in this very moment may be in the server's memory only, and the server is killed below.
    eventually(tended(refused), "the disk is full")
    stack._children[0].process.kill()  # the scheduler, and then the server itself, which cannot start now
    stack._server._process.kill()
    eventually(tended(lambda: any("server could not be started" in line for line in lines)), "it is tried again")
    (folder / "fill").unlink()
    again = eventually(tended(submitted), "a task is accepted again")
    eventually(tended(lambda: not stack.waiting_for()), "all nodes are back")
    for task_id in [*accepted, again]:
        with Client(stack.url) as client:
            eventually(tended(lambda: client.status(task_id).state.final), "it ends")
            assert client.status(task_id).state == "succeeded", client.status(task_id)
print(len(lines), "lines", file=sys.stderr)
"""


def test_a_full_disk_loses_nothing_accepted_and_all_comes_back(tmp_path: Path) -> None:
    """On a small file system of its own, logs and all; the server and the scheduler are killed meanwhile."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root, and mount namespaces")
    tests = Path(__file__).parents[1]
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=8m,mode=700 none {disk} && exec {sys.executable} {script} {disk}"
    paths = f"{tests.parent}:{tests}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = int(done.stderr.splitlines()[-1].split()[0])
    assert lines < 60  # what happened is said, and not over and over


# --- links and folders of others


def test_a_data_folder_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(BadSetting, match=r"everybody may write in .*shared: `chmod o-w` it, or set .*PERLLM_DATA_DIR"):
        EmbeddedServer(shared).start()
    with (
        pytest.raises(BadSetting, match="everybody may write"),
        Supervisor(Settings(data_dir=shared), edges=(), clouds=()),
    ):
        pass
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("name", ["valkey.lock", "valkey.log", "valkey.conf", "password"])
def test_a_link_laid_in_the_data_folder_turns_nothing_elsewhere(tmp_path: Path, name: str) -> None:
    folder, mine = tmp_path / "data", tmp_path / "mine"
    folder.mkdir(0o700)
    mine.write_text("precious")
    if name != "password":  # a password that is there is read, wherever it lies
        (folder / name).symlink_to(mine)
    else:
        (folder / name).symlink_to(tmp_path / "nothing")
    with suppress(BadSetting), EmbeddedServer(folder, free_port()):
        pass
    assert mine.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_what_is_written_is_for_its_user_alone_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_own(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o600)
    assert stat.S_IMODE(own_folder(tmp_path / "folder", "X").stat().st_mode) == 0o700
    with pytest.raises(UnicodeEncodeError):
        write_own(path, "\ud800")  # as any failure half-way
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["secret"]


# --- clocks that are set while all is running


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("clock") / "wrong_clock.so"
    source = Path(__file__).parents[1] / "support" / "wrong_clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, source, "-ldl"], check=True)
    return built


def test_clocks_that_are_set_by_an_hour_harm_nothing(
    valkey: EmbeddedServer, tmp_path: Path, clock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process after another, forth and back, while tasks run: no lease is lost, nothing expires, the leader
    leads on."""
    kwargs = {"prompt": "hi", "max_tokens": 2}
    with Cluster(valkey.url, tmp_path, slots=2, emulated_speed=100, lease=3) as cluster:
        redis_of(cluster.ledger).flushall()

        def start(name: str) -> Process:
            monkeypatch.setenv("WRONG_CLOCK_FILE", str(tmp_path / f"{name}.clock"))
            if name == "scheduler":
                return cluster.start_scheduler(name)
            return cluster.start_inbox() if name == "inbox" else cluster.start_node(name)

        monkeypatch.setenv("LD_PRELOAD", str(clock))
        started = {name: start(name) for name in ("scheduler", "a", "b", "inbox")}
        monkeypatch.delenv("LD_PRELOAD")
        cluster.watch(started["scheduler"], lambda: cluster.leads(started["scheduler"]), "leads")
        for node in ("a", "b"):
            cluster.await_node(started[node])

        def runs(ids: list[str]) -> bool:
            return any(cluster.in_state(i, "running") for i in ids)

        every = list[str]()
        for name in started:
            for jump in (3600, -3600):
                ids = cluster.submit(4, max_tokens=40, deadline=300)
                eventually(partial(runs, ids), "some run")
                (tmp_path / f"{name}.clock").write_text(str(jump))
                every += ids
            assert cluster.producer().send_task("perllm.generate", kwargs=kwargs, queue="inbox").get(timeout=60)
        results = [cluster.result(i) for i in every]
        assert {r.state for r in results} == {"succeeded"}
        assert {cluster.task(r.id).attempt for r in results} == {1}
        assert all(0 <= r.latency < 300 and r.on_time for r in results)
        assert cluster.leads(started["scheduler"])
        (late,) = cluster.submit(max_tokens=4000, deadline=1)
        assert cluster.result(late).state == "expired"
        cluster.stop()
