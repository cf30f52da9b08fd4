"""The API stops with grace: answers under way end, new requests are told when to come again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.api import ApiProcess
from support.cluster import Cluster
from support.raw import redis_of
from support.servers import Server
from support.wait import PATIENCE, eventually

from perllm.broker.ledger import Ledger
from perllm.broker.messages import State

ENDLESS = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100_000, "deadline": 600}


@pytest.fixture(scope="module")
def cluster(valkey: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(valkey.url, tmp_path_factory.mktemp("stop"), emulated_speed=100, context=200_000) as running:
        redis_of(running.ledger).flushall()
        running.scheduler()
        running.start_nodes("a")
        yield running


def under_way(
    threads: ThreadPoolExecutor, api: ApiProcess, ledger: Ledger, tasks: int, **more: object
) -> Future[httpx.Response]:
    """An answer, once so many tasks run."""
    asked = threads.submit(
        httpx.post,
        f"{api.base}/v1/chat/completions",
        json=ENDLESS | more,
        timeout=PATIENCE,
        headers={"Connection": "close"},
    )
    eventually(lambda: ledger.counts()[State.RUNNING] == tasks, "it runs")
    return asked


def test_what_is_under_way_ends_and_what_is_new_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    with (
        ApiProcess(cluster.url_of("api"), tmp_path, api_open="true", grace=600) as api,
        ThreadPoolExecutor(1) as threads,
    ):
        answer = under_way(threads, api, cluster.ledger, 1, stream=True)
        api.process.terminate()
        with httpx.Client(base_url=api.base) as http:
            eventually(lambda: http.get("/ready").json()["status"] == "stopping", "it is about to stop")
            assert http.get("/health").status_code == 200
            refused = http.post("/v1/chat/completions", json=ENDLESS)
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert 1 <= int(refused.headers["retry-after"]) <= 602
        assert "about to stop" in refused.json()["error"]["message"]
        (task_id,) = cluster.ledger.ids(State.RUNNING)
        cluster.ledger.cancel(task_id)  # so the answer ends
        assert "task_cancelled" in answer.result().text.splitlines()[-2]
        assert api.process.wait(PATIENCE) == -signal.SIGTERM  # as Uvicorn ends


def test_what_outlasts_the_grace_is_told(cluster: Cluster, tmp_path: Path) -> None:
    with (
        ApiProcess(cluster.url_of("api"), tmp_path, api_open="true", grace=0.2) as api,
        ThreadPoolExecutor(2) as threads,
    ):
        streamed = under_way(threads, api, cluster.ledger, 1, stream=True)
        (task_id,) = cluster.ledger.ids(State.RUNNING)
        waited = under_way(threads, api, cluster.ledger, 2)
        api.process.terminate()
        assert "this server stops" in streamed.result().text.splitlines()[-2]
        assert (waited.result().status_code, waited.result().headers["retry-after"]) == (503, "1")
        # The stream names its task, which goes on; who only waited asks again, and does not pay twice.
        eventually(lambda: cluster.ledger.ids(State.RUNNING) == [task_id], "what was waited for is cancelled")
        cluster.ledger.cancel(task_id)
        assert api.process.wait(PATIENCE) == -signal.SIGTERM
