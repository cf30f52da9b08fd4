"""The embedded server: what stands in its way is one clear error, what it acknowledged is there again, and nobody else
gets in."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.ports import free_port
from support.raw import redis_of
from support.servers import ping
from support.wait import eventually

from perllm.broker.connection import check
from perllm.broker.errors import BadSetting, Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State, TaskSpec, new_id
from perllm.broker.settings import Settings


@pytest.mark.parametrize("port", [False, True], ids=["socket", "port"])
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, port: bool) -> None:
    number = free_port() if port else None
    with EmbeddedServer(tmp_path, number) as server:
        url = server.url
        redis.Redis.from_url(url).set("k", "v")
        server.kill()
        assert not ping(url)
    with EmbeddedServer(tmp_path, number) as server:
        assert server.url == url  # the password stays too
        assert redis.Redis.from_url(url).get("k") == b"v"


@pytest.mark.parametrize("fsync", ["everysec", "always"])
def test_no_submission_that_was_acknowledged_is_lost_by_a_kill(tmp_path: Path, fsync: str) -> None:
    """The file is written before anything is answered. What `everysec` may lose, `always` not, is what the end of the
    machine itself (a power cut) keeps from the disk: tests/chaos cuts the file for that."""
    server = EmbeddedServer(tmp_path, fsync=fsync)
    server.start()
    ledger = Ledger(Settings.model_validate({"redis_url": server.url}))
    assert redis_of(ledger).config_get("appendfsync")["appendfsync"] == fsync
    acknowledged = list[str]()

    def submit() -> None:
        with suppress(Unreachable):
            while True:
                acknowledged.extend(ledger.submit([(new_id(), TaskSpec(prompt="hi")) for _ in range(3)]))

    with ThreadPoolExecutor(1) as thread:
        thread.submit(submit)
        eventually(lambda: len(acknowledged) > 500, "it submits")
        server.kill()
    with server:
        again = Ledger(Settings.model_validate({"redis_url": server.url}))
        assert all(again.known(acknowledged))
        assert again.totals()["submitted"] == again.counts()[State.PENDING] >= len(acknowledged)
        again.close()
    ledger.close()


def test_any_folder_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("da ta", 'q"#1%20?ü')
    with EmbeddedServer(folder):
        check(Settings(data_dir=folder))


def test_others_may_not_look_inside(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with EmbeddedServer(tmp_path / "new", free_port()) as server:
        redis.Redis.from_url(server.url).set("k", "v")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        with pytest.raises(redis.exceptions.AuthenticationError):
            redis.Redis(port=server.port or 0, retry=Retry(NoBackoff(), 0)).get("k")
    with EmbeddedServer(tmp_path) as server:
        redis.Redis.from_url(server.url).set("k", "v")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755  # somebody's folder stays as it was …
    secrets = [*tmp_path.glob("valkey.conf"), *tmp_path.glob("appendonlydir/*")]
    assert len(secrets) > 1
    assert not [p for p in secrets if p.stat().st_mode & 0o077]  # … and what lies in it is private


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BadSetting, match=rf"port {port} is in use"):
            EmbeddedServer(tmp_path, port).start()
    with EmbeddedServer(tmp_path, port) as server:  # nothing half-done stays behind
        assert ping(server.url)


@pytest.mark.parametrize("second_port", [False, True], ids=["socket", "port"])
def test_a_folder_in_use(tmp_path: Path, second_port: bool) -> None:
    """Two servers would write to the same file, whatever they listen on."""
    with EmbeddedServer(tmp_path) as server:
        with pytest.raises(BadSetting, match=r"a server already runs in .*PERLLM_DATA_DIR"):
            EmbeddedServer(tmp_path, free_port() if second_port else None).start()
        assert ping(server.url)


def test_the_folder_is_free_again_when_the_server_was_killed_and_not_before(tmp_path: Path) -> None:
    code = "import sys, pathlib; from perllm.broker.local.server import EmbeddedServer"
    code += "; s = EmbeddedServer(pathlib.Path(sys.argv[1])); s.start()"
    wait = "; print(s.pid, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code + wait, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline()
        with pytest.raises(BadSetting, match=r"already runs"):
            EmbeddedServer(tmp_path).start()
        owner.kill()
    server = EmbeddedServer(tmp_path)

    def starts() -> bool:
        try:
            server.start()
        except BadSetting:  # the orphan is about to be ended
            return False
        return True

    eventually(starts, "the folder is free")
    server.stop()


@pytest.mark.parametrize("port", [None, 1], ids=["socket", "port"])
def test_a_folder_that_cannot_be(tmp_path: Path, port: int | None) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadSetting, match=r"file/below cannot be used \(Not a directory\): set PERLLM_DATA_DIR"):
        EmbeddedServer(tmp_path / "file" / "below", port).start()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadSetting, match=r"cannot be used .*: set PERLLM_DATA_DIR"):
        EmbeddedServer(tmp_path).start()


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    with pytest.raises(BadSetting, match=r"too long for a Unix socket"):
        EmbeddedServer(folder).start()
    assert not folder.exists()


def test_a_wrong_password_and_no_password(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, free_port()) as server:
        check(Settings(redis_url=server.url))
        for login in ("", ":wrong@", "user:wrong@"):
            with pytest.raises(Unreachable, match=r"refused the login.*PERLLM_REDIS_URL") as caught:
                check(Settings(redis_url=f"redis://{login}127.0.0.1:{server.port}"))
            assert "wrong@" not in str(caught.value)


def test_no_server_there() -> None:
    with pytest.raises(Unreachable, match=r"no Redis server answers at redis://127\.0\.0\.1:\d+ .*: is it running"):
        check(Settings(redis_url=f"redis://127.0.0.1:{free_port()}"))
