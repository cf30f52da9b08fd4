"""Nonsense of every shape, made by Hypothesis, into the script, the event stream and the queues: nobody ends of it, and
work goes on. (The HTTP API has its own, test_api_fuzz.)"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import users
from support.cluster import Cluster
from support.make import node_info, output, receipt, why
from support.raw import prefix_of, redis_of
from support.wait import eventually

from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import TaskSpec
from perllm.broker.queues.app import node_message
from perllm.broker.settings import Settings

OPERATIONS = (
    "submit",
    "cancel",
    "revoke",
    "refuse",
    "announce",
    "follow",
    "followed",
    "expire",
    "forget",
    "lead",
    "resign",
    "dispatch",
    "end",
    "sweep",
    "snapshot",
    "take_back",
    "distrust",
    "register",
    "beat",
    "claim",
    "say",
    "complete",
    "fail",
    "hand_back",
    "drain",
    "leave",
)
#: What means something here, and what means nothing anywhere.
WORDS = st.sampled_from(
    ["t0", "t1", "n", "boot-1", "token", "1", "0", "-1", "succeeded", "expired", "{}", "nan", "1e400"]
)
ARGUMENT = WORDS | st.text(max_size=20) | st.binary(max_size=20) | st.integers() | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SLOW_IS_FINE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.fixture
def ledger(valkey: EmbeddedServer) -> Iterator[Ledger]:
    one = Ledger(Settings.model_validate({"redis_url": valkey.url, "lease": 300, "heartbeat": 60}))
    redis_of(one).flushall()
    yield one
    one.close()


def work(ledger: Ledger, task_id: str) -> None:
    """A task's whole life."""
    redis_of(ledger).delete(f"{prefix_of(ledger)}leader")
    epoch = ledger.lead("me", 60)
    assert epoch is not None
    while ledger.register(node_info("good")) is not None:
        ledger.leave("good", "boot-1", "again")
    ledger.submit([(task_id, TaskSpec(prompt="hi", deadline=600))])
    sent = Dispatch(task_id, 1, "good", "boot-1", "emulated", "edge.good", node_message(task_id, 1, "edge.good"), why())
    assert ledger.dispatch(epoch, [sent]) == ["ok"]
    assert ledger.claim(task_id, 1, "good", "token") is not None
    assert ledger.complete(task_id, 1, "token", "succeeded", output(), receipt("good")) == "ok"


@settings(max_examples=25, suppress_health_check=SLOW_IS_FINE)
@given(calls=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.lists(ARGUMENT, max_size=12)), min_size=5, max_size=20))
def test_calls_of_every_shape(ledger: Ledger, calls: list[tuple[str, list[Any]]]) -> None:
    redis_of(ledger).flushall()
    for reply in ledger._script.pipeline([(operation, *arguments) for operation, arguments in calls]):
        assert not isinstance(reply, redis.exceptions.ConnectionError)
    ledger.nodes()
    ledger.counts()
    ledger.events("0-0")
    work(ledger, "good")


@pytest.fixture(scope="module")
def known(cluster: Cluster) -> list[dict[str, Any]]:
    """An event of each kind, as they are on the stream."""
    entries = redis_of(cluster.ledger).xrange(f"{prefix_of(cluster.ledger)}events")
    return list({(e := json.loads(fields[b"e"]))["type"]: e for _, fields in entries}.values())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("fuzz")
    with (
        EmbeddedServer(folder / "server", users=users.rules()) as server,
        Cluster(server.url, folder, lease=30, policy="cs-ucb") as one,
    ):
        one.start_inbox()
        one.scheduler()
        one.start_nodes("a")
        goes_on(one)
        yield one


def goes_on(cluster: Cluster) -> None:
    sent = cluster.producer().send_task("perllm.generate", kwargs={"prompt": "hi", "max_tokens": 1}, queue="inbox")
    assert sent.get(timeout=60)["state"] == "succeeded"
    for process in cluster.processes:
        assert process.running, process.output


@settings(max_examples=8, derandomize=True, suppress_health_check=SLOW_IS_FINE)
@given(data=st.data())
def test_messages_of_every_shape(cluster: Cluster, data: st.DataObject) -> None:
    """Real ones with a part of them changed, and what is no message, into the inbox and a node's queue."""
    for queue in ("inbox", "edge.a"):
        for _ in range(20):
            message = json.loads(node_message("t0", 1, queue))
            part = data.draw(st.sampled_from([message, message["headers"], message["properties"]]), "part")
            part[data.draw(st.sampled_from(sorted(part)), "field")] = data.draw(JSON, "value")
            redis_of(cluster.ledger).lpush(queue, json.dumps(message))
        for raw in data.draw(st.lists(st.binary(max_size=30) | JSON.map(json.dumps), max_size=5), "no messages"):
            redis_of(cluster.ledger).lpush(queue, raw)
    eventually(lambda: not any(map(redis_of(cluster.ledger).llen, ("inbox", "edge.a"))), "the queues are empty")
    goes_on(cluster)


@settings(max_examples=3, derandomize=True, suppress_health_check=SLOW_IS_FINE)
@given(data=st.data())
def test_events_of_every_shape(cluster: Cluster, known: list[dict[str, Any]], data: st.DataObject) -> None:
    """Real ones with a part of them changed, and what is no event. What is true after forged ones is another question:
    only schedulers, workers and producers may write to the stream."""
    pipe = redis_of(cluster.ledger).pipeline(transaction=False)
    for _ in range(100):
        event = dict(data.draw(st.sampled_from(known), "event"))
        event[data.draw(st.sampled_from(sorted(event)), "field")] = data.draw(JSON, "value")
        pipe.xadd(f"{prefix_of(cluster.ledger)}events", {"e": json.dumps(event)})
    for value in data.draw(st.lists(JSON | st.binary(max_size=30), max_size=5), "no events"):
        pipe.xadd(f"{prefix_of(cluster.ledger)}events", {"e": value if isinstance(value, bytes) else json.dumps(value)})
    pipe.execute()

    def has_read_it_all() -> bool:
        saved, (_, newest) = cluster.ledger.load_snapshot(), cluster.ledger.first_and_last_event()
        return saved is not None and _at(saved["position"]) >= _at(newest)

    scheduler = next(p for p in cluster.processes if p.name == "scheduler")
    cluster.watch(scheduler, has_read_it_all, "has read it all")


def _at(position: str) -> int:
    return int(position.split("-", maxsplit=1)[0])
