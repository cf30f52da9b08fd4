"""A task's text reaches a watcher while it is generated, and the same pieces come again to one who returns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.make import node_info, output, receipt, why
from support.raw import redis_of
from support.servers import Server
from support.wait import eventually

from perllm import AsyncClient, Client, Result, TaskNotFound, TaskSpec
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.messages import Delta, State, new_id


@pytest.fixture
def cluster(server: Server, ledger: Ledger, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(server.url, tmp_path, emulated_speed=100) as running:
        yield running


async def watched(url: str, task_id: str) -> tuple[list[str], Result]:
    async with AsyncClient(url) as client:
        pieces: list[str] = []
        async for piece in client.stream(task_id):
            if isinstance(piece, Result):
                return pieces, piece
            pieces.append(piece)
    raise AssertionError("no result")


def test_text_comes_in_pieces_before_the_result_and_again_afterwards(cluster: Cluster) -> None:
    cluster.scheduler()
    cluster.start_nodes("one")
    (task_id,) = cluster.ledger.submit([(new_id(), TaskSpec(prompt="hi", max_tokens=40, stream=True))])
    pieces, result = asyncio.run(watched(cluster.settings.url, task_id))
    assert len(pieces) > 2
    assert result.text.startswith("".join(pieces))
    again, _ = asyncio.run(watched(cluster.settings.url, task_id))
    assert again[: len(pieces)] == pieces


def test_without_being_asked_nothing_is_published(cluster: Cluster) -> None:
    cluster.scheduler()
    cluster.start_nodes("one")
    (task_id,) = cluster.ledger.submit([(new_id(), TaskSpec(prompt="hi", max_tokens=10))])
    pieces, result = asyncio.run(watched(cluster.settings.url, task_id))
    assert pieces == []
    assert result.text == " ".join(["word"] * 10)


def running(ledger: Ledger) -> tuple[str, str]:
    """A task that attempt 1 runs, and its token."""
    node = node_info("n")
    ledger.register(node)
    (task_id,) = ledger.submit([(new_id(), TaskSpec(prompt="hi", stream=True))])
    place(ledger, task_id, 1, "t1")
    return task_id, "t1"


def place(ledger: Ledger, task_id: str, attempt: int, token: str) -> None:

    epoch = ledger.lead("me", 60)
    assert epoch is not None
    dispatch = Dispatch(task_id, attempt, "n", "boot-1", "emulated", "edge.n", "{}", why())
    assert ledger.dispatch(epoch, [dispatch]) == ["ok"]
    assert ledger.claim(task_id, attempt, "n", token) is not None


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (["one ", "two ", "three"], ["one ", "two", " ", "three"]),
        (["one", " two three"], ["one ", "two", " three"]),
        (["other", " words"], ["one ", "two"]),
    ],
)
def test_a_second_attempt_goes_on_where_the_first_was_lost(
    server: Server, ledger: Ledger, second: list[str], told: list[str]
) -> None:
    task_id, token = running(ledger)
    for piece in ("one ", "two"):
        assert ledger.say(task_id, 1, token, [Delta(text=piece)]) == "ok"
    ledger.hand_back(task_id, 1, token, "stopping")
    assert ledger.say(task_id, 1, token, [Delta(text="late")]) == "void"
    place(ledger, task_id, 2, "t2")
    for piece in second:
        assert ledger.say(task_id, 2, "t2", [Delta(text=piece)]) == "ok"
    assert ledger.complete(task_id, 2, "t2", "succeeded", output("".join(second)), receipt("n", 2)) == "ok"
    pieces, result = asyncio.run(watched(server.url, task_id))
    assert result.state is State.SUCCEEDED
    assert pieces == told


def test_an_unknown_task_is_said_to_be_unknown(server: Server, ledger: Ledger) -> None:
    with pytest.raises(TaskNotFound):
        asyncio.run(watched(server.url, "nobody"))


def test_many_wait_at_once_for_the_same_task(server: Server, ledger: Ledger) -> None:
    task_id, token = running(ledger)

    async def wait_all() -> list[Result]:
        async with AsyncClient(server.url) as client:
            waiting = [asyncio.create_task(client.result(task_id, 30)) for _ in range(20)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.to_thread(ledger.complete, task_id, 1, token, "succeeded", output(), receipt("n"))
            return await asyncio.gather(*waiting[1:])

    assert {r.id for r in asyncio.run(wait_all())} == {task_id}


def test_a_tenants_tasks_are_listed_by_age_and_forgotten_with_the_task(ledger: Ledger) -> None:
    ids = ledger.submit((f"a{n}", TaskSpec(prompt="hi", tenant="a")) for n in range(5))
    ledger.submit([("b1", TaskSpec(prompt="hi", tenant="b"))])
    assert ledger.tasks_of("a", after=None, limit=3) == ids[:1:-1]
    assert ledger.tasks_of("a", after="a2", limit=9) == ["a1", "a0"]
    assert ledger.tasks_of("a", after="b1", limit=9) == []
    assert ledger.tenants(["a1", "b1", "c"]) == ["a", "b", None]
    ledger.cancel("a3")
    short = Ledger(ledger.settings.model_copy(update={"retention_tasks": 1, "retention": 1.0}))
    ledger.cancel("a4")
    short.sweep()
    assert "a3" not in ledger.tasks_of("a", after=None, limit=9)


def test_hundreds_awaited_at_once_share_one_connection(server: Server, ledger: Ledger) -> None:
    ids = ledger.submit([(new_id(), TaskSpec(prompt="hi")) for _ in range(300)])

    def listeners() -> list[int]:
        return [n for c in redis_of(ledger).client_list() if (n := int(c["sub"]))]

    async def awaited() -> list[Result]:
        async with AsyncClient(server.url) as client:
            waiting = [asyncio.create_task(client.result(i, 60)) for i in ids]
            await asyncio.to_thread(eventually, lambda: listeners() == [300], "all listen on one connection")
            ledger.cancel_many(ids)
            return await asyncio.gather(*waiting)

    assert {r.state for r in asyncio.run(awaited())} == {State.CANCELLED}


def test_results_waited_for_one_by_one_share_one_connection(server: Server, ledger: Ledger) -> None:
    """Also from many threads. A connection each costs more than the wait, over TLS eight times."""
    redis = redis_of(ledger)

    def opened() -> int:
        return int(redis.info("stats")["total_connections_received"])

    def ended(task_id: str) -> State:
        eventually(lambda: redis.pubsub_numsub(ledger.ended(task_id))[0][1], "it is waited for")
        ledger.cancel(task_id)
        ledger.announce()  # as the scheduler does
        return State.CANCELLED

    with Client(server.url) as client, ThreadPoolExecutor(4) as threads:
        tasks = client.submit_many(["hi"] * 12)
        before = ledger.now() and opened()  # both are connected
        for task in tasks[:4]:
            waiting = threads.submit(task.result, 60)
            assert ended(task.id) == waiting.result().state
        assert opened() - before <= 2  # to look, and to listen
        several = [threads.submit(task.result, 60) for task in tasks[4:8]]
        assert [ended(task.id) for task in tasks[4:8]] == [waiting.result().state for waiting in several]
        last = threads.submit(tasks[8].result, 60)
        eventually(lambda: redis.pubsub_numsub(ledger.ended(tasks[8].id))[0][1], "it listens")
        eventually(lambda: sum(int(c["sub"]) for c in redis.client_list()) == 1, "to nothing else")
        assert ended(tasks[8].id) == last.result().state
    eventually(lambda: not any(int(c["sub"]) for c in redis.client_list()), "nobody listens any more")
