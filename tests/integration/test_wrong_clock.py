"""Machines whose clocks are an hour off: time is the server's, so nothing depends on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.raw import redis_of

from perllm.broker.local.server import EmbeddedServer

SOURCE = Path(__file__).parents[1] / "support" / "wrong_clock.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("clock") / "wrong_clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, SOURCE, "-ldl"], check=True)
    return built


def shifted(monkeypatch: pytest.MonkeyPatch, library: Path, seconds: int) -> None:
    """Processes started from now on are off by so much."""
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("WRONG_CLOCK", str(seconds))


def test_the_clock_is_wrong_at_all(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    shifted(monkeypatch, library, 3600)
    code = "import time, datetime; print(time.time(), datetime.datetime.now().timestamp())"
    said = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert all(3000 < float(word) - time.time() < 4000 for word in said.stdout.split())


def test_nodes_and_scheduler_an_hour_off(
    valkey: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    """The scheduler is an hour ahead, one node ahead and one behind: deadlines hold and nothing expires by mistake."""
    with Cluster(valkey.url, tmp_path, slots=1, emulated_speed=100, context=100_000, lease=3) as cluster:
        redis_of(cluster.ledger).flushall()
        for name, seconds in (("ahead", 3600), ("behind", -3600)):
            shifted(monkeypatch, library, seconds)
            cluster.start_node(name)
        shifted(monkeypatch, library, 3600)
        cluster.scheduler()
        for process in cluster.processes[:2]:
            cluster.await_node(process)
        results = [cluster.result(i) for i in cluster.submit(12, max_tokens=20, deadline=300)]
        assert {r.state for r in results} == {"succeeded"}
        assert {r.receipt.node for r in results if r.receipt} == {"ahead", "behind"}
        assert {cluster.task(r.id).attempt for r in results} == {1}  # no lease lapsed
        for result in results:
            assert result.on_time
            assert result.receipt is not None
            assert 0 <= result.latency < 300
            assert 0 < result.receipt.decode < 60
        (late,) = cluster.submit(max_tokens=90_000, deadline=1)
        assert cluster.result(late).state == "expired"
        assert cluster.result(late).latency < 60
        cluster.stop()
