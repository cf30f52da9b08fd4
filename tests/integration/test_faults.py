"""A bad network between everybody and the server: what was handed in is done once, and everybody comes back.

Times are a server's absence of seconds; `make chaos` kills for longer. Everybody has a proxy of his own.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from celery.result import AsyncResult
from support import users
from support.cluster import Cluster, Process
from support.proxy import Proxy
from support.raw import redis_of
from support.wait import PATIENCE, eventually

from perllm.broker import connection
from perllm.broker.client import AsyncClient, Client
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Completed, State, TaskSpec, new_id
from perllm.broker.settings import Settings

SPEC = TaskSpec(prompt="hi", deadline=600)


@pytest.fixture
def ledger(valkey: EmbeddedServer) -> Iterator[Ledger]:
    """The test's own, on an empty server, by no proxy."""
    one = Ledger(Settings.model_validate({"redis_url": valkey.url, "lease": 300, "heartbeat": 60}))
    redis_of(one).flushall()
    yield one
    one.close()


@pytest.fixture
def proxy(valkey: EmbeddedServer) -> Iterator[Proxy]:
    with Proxy(valkey.url) as one:
        yield one


def end(ledger: Ledger, task_id: str) -> None:
    ledger.cancel(task_id)


# --- producers


def test_what_is_submitted_over_breaking_connections_is_there_once(ledger: Ledger, proxy: Proxy) -> None:
    producer = Ledger(Settings.model_validate({"redis_url": proxy.url}))
    stop, sent = threading.Event(), list[str]()

    def submit() -> None:
        while not stop.is_set():
            ids = [new_id() for _ in range(50)]
            while ids != try_to_submit(ids):
                pass
            sent.extend(ids)

    def try_to_submit(ids: list[str]) -> list[str] | None:
        try:
            return producer.submit([(i, SPEC) for i in ids])
        except Unreachable:  # then the same again, as its documentation says
            return None

    with ThreadPoolExecutor(1) as thread:
        submitting = thread.submit(submit)
        try:
            for round_ in range(10):
                eventually(lambda at=round_: len(sent) > 100 * at, "it goes on")  # type: ignore[misc]
                proxy.reset()
        finally:
            stop.set()
        submitting.result()
    assert all(ledger.known(sent))
    assert ledger.totals() == {"submitted": ledger.counts()[State.PENDING]}
    producer.close()


@pytest.mark.parametrize("fault", ["silence", "nobody there"])
def test_a_server_that_does_not_answer_is_one_error_in_bounded_time(
    proxy: Proxy, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RETRY_TIME", 0.5)
    ledger = Ledger(Settings.model_validate({"redis_url": proxy.url}), reply_timeout=0.2)
    assert ledger.counts()[State.PENDING] >= 0
    if fault == "silence":
        proxy.hold()
    else:
        proxy.down()
    with pytest.raises(Unreachable, match=r"no Redis server answers at redis://127\.0\.0\.1"):
        ledger.submit([(new_id(), SPEC)])
    with pytest.raises(Unreachable):
        ledger.counts()
    ledger.close()


def breaks(proxy: Proxy) -> None:
    proxy.reset()


def goes_away_and_comes_back(proxy: Proxy) -> None:
    proxy.down()
    threading.Timer(2.0, proxy.up).start()


FAULTS = [breaks, goes_away_and_comes_back]


@pytest.mark.parametrize("fault", FAULTS)
def test_who_waits_waits_on(
    ledger: Ledger, proxy: Proxy, fault: Callable[[Proxy], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RETRY_TIME", 0.1)  # as if the outage were long

    with Client(proxy.url) as client, ThreadPoolExecutor(1) as thread:
        task = client.submit("hi", deadline=600)
        waiting = thread.submit(task.result, 60)
        eventually(lambda: redis_of(ledger).pubsub_numsub(ledger.ended(task.id))[0][1], "it listens")
        fault(proxy)
        ledger.cancel(task.id)
        assert waiting.result().state == "cancelled"


@pytest.mark.parametrize("fault", FAULTS)
def test_who_awaits_waits_on(
    ledger: Ledger, proxy: Proxy, fault: Callable[[Proxy], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "RETRY_TIME", 0.1)  # as if the outage were long

    async def scene() -> str:
        async with AsyncClient(proxy.url) as client:
            task = await client.submit("hi", deadline=600)
            waiting = asyncio.create_task(task.result(60))

            def listens() -> bool:
                return bool(redis_of(ledger).pubsub_numsub(ledger.ended(task.id))[0][1])

            await asyncio.to_thread(eventually, listens, "it listens")
            fault(proxy)
            ledger.cancel(task.id)
            return (await waiting).state

    assert asyncio.run(scene()) == "cancelled"


def test_a_server_that_never_answered_is_not_waited_for(proxy: Proxy) -> None:
    proxy.down()
    with Client(proxy.url) as client, pytest.raises(Unreachable):
        client.result("t", 60)


# --- everybody else


class Scene:
    """A scheduler, two nodes and an inbox, each behind a proxy of its own."""

    def __init__(self, cluster: Cluster, proxies: dict[str, Proxy], processes: list[Process]) -> None:
        self.cluster, self.proxies, self.processes = cluster, proxies, processes

    def all(self, fault: Callable[[Proxy], None]) -> None:
        for proxy in self.proxies.values():
            fault(proxy)

    def works(self, ids: list[str]) -> None:
        """These tasks, and some that come by the inbox, end well and once; everybody is still there."""
        sent = [self.send() for _ in range(4)]
        self.end_well(ids)
        for result in sent:
            assert result.get(timeout=PATIENCE)["state"] == "succeeded"

    def send(self) -> AsyncResult:
        kwargs = {"prompt": "hi", "max_tokens": 1, "deadline": 600}
        return self.cluster.producer().send_task("perllm.generate", kwargs=kwargs, queue="inbox")

    def end_well(self, ids: list[str]) -> None:
        for task_id in ids:
            assert self.cluster.result(task_id).state == "succeeded"
        events = self.cluster.ledger.events("0-0", count=100_000)
        completed = Counter(e.id for _, e in events if isinstance(e, Completed))
        assert set(completed.values()) == {1}
        for process in self.processes:
            assert process.running, process.output


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("faults")
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(folder / "server", users=users.rules()))
        limits = {"slots": 2, "emulated_speed": 100, "max_strikes": 10, "leader_ttl": 3, "lease": 2}
        cluster = stack.enter_context(Cluster(server.url, folder, **limits))
        roles = {"scheduler": "scheduler", "a": "worker", "b": "worker", "inbox": "inbox"}
        proxies = {name: stack.enter_context(Proxy(users.url_of(role, server.url))) for name, role in roles.items()}
        urls = {name: proxy.url for name, proxy in proxies.items()}
        inbox = cluster.start_worker("broker", "inbox", redis_url=urls["inbox"])
        processes = [inbox, *(cluster.start_node(n, redis_url=urls[n]) for n in ("a", "b"))]
        processes.append(cluster.scheduler(redis_url=urls["scheduler"]))
        for node in processes[1:3]:
            cluster.await_node(node)
        yield Scene(cluster, proxies, processes)


def test_slow_lines(scene: Scene) -> None:
    scene.all(lambda p: p.delay(0.2))
    scene.works(scene.cluster.submit(6))
    scene.all(lambda p: p.delay(0.0))


def test_broken_connections(scene: Scene) -> None:
    ids = scene.cluster.submit(20, max_tokens=20)
    for done in (2, 6, 10):
        eventually(lambda n=done: sum(scene.cluster.in_state(i, "succeeded") for i in ids) >= n, "it goes on")  # type: ignore[misc]
        scene.all(Proxy.reset)
    scene.works(ids)


def test_a_server_out_of_reach_for_longer_than_a_lease(scene: Scene) -> None:
    ids = scene.cluster.submit(6, max_tokens=100)
    eventually(lambda: sum(scene.cluster.in_state(i, "running") for i in ids) >= 2, "some run")
    scene.all(Proxy.down)
    alive = scene.cluster.ledger
    lapsed = alive.now() + scene.cluster.settings.lease
    eventually(lambda: alive.now() > lapsed, "every lease has lapsed")
    scene.all(Proxy.up)
    scene.works(ids)


def test_lines_that_lead_nowhere(scene: Scene) -> None:
    """Half-open: nobody is told that his connection is dead, so everybody has to find out. Of what is in the inbox, the
    server hands the next message down the dead line, and Celery's transport keeps no other copy: that one is lost."""
    scene.all(Proxy.forget)
    scene.end_well(scene.cluster.submit(6))
    scene.send()
    last = scene.send()
    eventually(lambda: scene.cluster.ledger.known([last.id])[0], "the inbox is back")


def test_a_silent_server(scene: Scene) -> None:
    ids = scene.cluster.submit(6, max_tokens=50)
    scene.all(Proxy.hold)
    lapsed = scene.cluster.ledger.now() + scene.cluster.settings.lease
    eventually(lambda: scene.cluster.ledger.now() > lapsed, "every lease has lapsed")
    scene.all(Proxy.let_through)
    scene.works(ids)
