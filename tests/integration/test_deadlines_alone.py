"""Whoever waits gets an answer at the deadline, whoever is dead: the scheduler, the workers, the server itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from celery.result import AsyncResult
from support.api import ApiProcess
from support.cluster import Cluster
from support.make import node_info, output, receipt, why
from support.raw import prefix_of, redis_of
from support.servers import Server
from support.wait import PATIENCE, eventually

from perllm import AsyncClient, Client
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Ended, State, TaskSpec, new_id
from perllm.broker.queues.app import node_message

SOON = {"prompt": "hi", "deadline": 0.3}


def test_who_waits_alone_ends_what_is_overdue(server: Server, ledger: Ledger) -> None:
    """No scheduler, no worker: the clients themselves."""

    async def awaited(task_id: str) -> State:
        async with AsyncClient(server.url) as client:
            return (await client.result(task_id)).state

    async def streamed(task_id: str) -> list[object]:
        async with AsyncClient(server.url) as client:
            return [piece async for piece in client.stream(task_id)]

    with Client(server.url) as client, ThreadPoolExecutor(2) as threads:
        tasks = client.submit_many([SOON | {"stream": True}] * 3)
        others = [
            threads.submit(asyncio.run, how(task.id)) for how, task in zip((awaited, streamed), tasks[1:], strict=True)
        ]
        result = tasks[0].result()
        assert (result.state, result.on_time, result.reason) == ("expired", False, "the deadline passed")
        assert others[0].result() == "expired"
        (last,) = others[1].result()
        assert last == client.result(tasks[2].id)
        ended = [e for _, e in ledger.events("0-0") if isinstance(e, Ended)]
        assert {e.id for e in ended} == {task.id for task in tasks}  # and a scheduler that comes hears of it
    assert ledger.expire() == 0


def test_what_is_not_overdue_is_nobodys_to_end(ledger: Ledger) -> None:
    """What runs has a lease beyond its deadline, for its worker to say what it has done."""
    ids = ledger.submit([(new_id(), TaskSpec(prompt="hi", deadline=60)) for _ in range(4)])
    ledger.register(node_info("n"))
    epoch = ledger.lead("test", 60) or 0
    for task_id in ids[1:]:
        message = node_message(task_id, 1, "edge.n")
        ledger.dispatch(epoch, [Dispatch(task_id, 1, "n", "boot-1", "emulated", "edge.n", message, why())])
    for task_id in ids[2:]:
        ledger.claim(task_id, 1, "n", "token")
    assert ledger.expire() == 0
    redis, prefix, past = redis_of(ledger), prefix_of(ledger), ledger.now() - 1
    for task_id, state in zip(ids, ("pending", "dispatched", "running"), strict=False):
        redis.hset(f"{prefix}task:{task_id}", "deadline", past)  # moves time
        if state != "running":
            redis.zadd(f"{prefix}in:{state}", {task_id: past})
    redis.zadd(f"{prefix}in:running", {ids[3]: past})  # its lease has lapsed, its deadline has not passed
    assert ledger.expire() == 2
    assert ledger.states(ids) == ["expired", "expired", "running", "running"]
    redis.zadd(f"{prefix}in:running", {ids[2]: past})
    assert ledger.expire() == 1
    assert ledger.complete(ids[2], 1, "token", "succeeded", output(), receipt("n")) == "void"


def test_a_worker_alone_keeps_deadlines_for_celerys_producers_too(valkey: EmbeddedServer, tmp_path: Path) -> None:
    with Cluster(valkey.url, tmp_path) as cluster:
        redis_of(ledger := cluster.ledger).flushall()
        cluster.start_nodes("a")
        (task_id,) = cluster.submit(deadline=0.3)
        with pytest.raises(Exception, match="the deadline passed"):
            AsyncResult(task_id, app=cluster.producer()).get(timeout=PATIENCE)
        assert cluster.result(task_id).state == "expired"
        assert ledger.register(node_info("dead")) is None
        redis_of(ledger).zadd(f"{prefix_of(ledger)}nodes", {"dead": ledger.now() - 1})  # moves time
        eventually(lambda: [info.name for info, _, _ in ledger.nodes()] == ["a"], "the dead one is swept")


# --- the API


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "server") as one:
        yield one


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_the_api_answers_in_time_whatever_is_dead(own: EmbeddedServer, tmp_path: Path) -> None:
    with (
        ApiProcess(own.url, tmp_path, api_open="true") as api,
        httpx.Client(base_url=api.base, timeout=PATIENCE) as http,
        ThreadPoolExecutor(2) as threads,
    ):

        def chat(deadline: float) -> httpx.Response:
            body = {"messages": [{"role": "user", "content": "hi"}], "deadline": deadline}
            return http.post("/v1/chat/completions", json=body)

        late = chat(0.3)  # nobody lives but the server
        assert (late.status_code, late.json()["error"]["code"]) == (422, "task_expired")
        waiting = threads.submit(chat, 1.5)
        redis = redis_of(api.ledger)
        eventually(lambda: redis.pubsub_channels(api.ledger.ended("*")), "it waits")
        with frozen(own):
            ready, metrics = threads.submit(http.get, "/ready"), http.get("/metrics")
            assert (metrics.status_code, ready.result().status_code) == (503, 503)
            assert ready.result().json()["status"] == "no server"
            assert http.get("/health").status_code == 200
            answer = waiting.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        eventually(lambda: http.get("/ready").json()["status"] == "no scheduler and no node", "it is back")
