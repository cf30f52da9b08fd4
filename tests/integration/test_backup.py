"""A backup as docs/operations.md says: the append-only file copied while the server works, or a snapshot of it."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from support.raw import redis_of
from support.servers import skip_without_debian_redis
from support.wait import eventually

from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State, TaskSpec, new_id
from perllm.broker.settings import Settings


@contextmanager
def submitting(ledger: Ledger) -> Iterator[list[str]]:
    """Somebody submits all the while; the ids that were acknowledged."""
    acknowledged, enough = list[str](), threading.Event()

    def submit() -> None:
        while not enough.is_set():
            acknowledged.extend(ledger.submit([(new_id(), TaskSpec(prompt="hi")) for _ in range(20)]))

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        eventually(lambda: len(acknowledged) > 500, "it submits")
        yield acknowledged
    finally:
        enough.set()
        thread.join()


def copy_append_only_file(server: EmbeddedServer, admin: redis.Redis, copy: Path) -> None:
    admin.config_set("auto-aof-rewrite-percentage", 0)
    eventually(lambda: admin.info("persistence")["aof_rewrite_in_progress"] == 0, "nothing is rewritten")
    shutil.copytree(server.data_dir / "appendonlydir", copy / "appendonlydir")


def take_snapshot(server: EmbeddedServer, admin: redis.Redis, copy: Path) -> None:
    skip_without_debian_redis()  # for its command line
    admin.config_set("repl-diskless-sync-delay", 0)  # nobody else comes
    subprocess.run(["redis-cli", "-s", server.socket, "--rdb", copy / "dump.rdb"], check=True, capture_output=True)
    base = copy / "appendonlydir"  # what a server with an append-only file begins with
    base.mkdir()
    (copy / "dump.rdb").rename(base / "appendonly.aof.1.base.rdb")
    (base / "appendonly.aof.manifest").write_text("file appendonly.aof.1.base.rdb seq 1 type b\n")


@pytest.mark.parametrize("take", [copy_append_only_file, take_snapshot])
def test_what_was_accepted_before_a_backup_is_there_when_it_is_restored(take: object, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    with EmbeddedServer(tmp_path / "one") as server:
        ledger = Ledger(Settings.model_validate({"redis_url": server.url}))
        with submitting(ledger) as acknowledged:
            before = list(acknowledged)
            take(server, redis_of(ledger), copy)  # type: ignore[operator]
        ledger.close()
        server.kill()
    with EmbeddedServer(copy) as server:
        again = Ledger(Settings.model_validate({"redis_url": server.url}))
        assert all(again.known(before))
        counts = again.counts()
        assert again.totals()["submitted"] == counts[State.PENDING] >= len(before)
        again.close()
