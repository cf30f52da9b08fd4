"""The whole path with real processes (scheduler, two edge nodes, inbox) and the emulated engine, on each server, as
producers with plain Celery see it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import celery
import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from kombu.transport.redis import Channel
from support import users
from support.cluster import Cluster
from support.poison import POISON
from support.raw import redis_of
from support.servers import Server
from support.wait import PATIENCE, eventually

from perllm.broker.errors import InvalidTask, TaskExpired, TaskFailed, TaskRejected
from perllm.broker.messages import new_id
from perllm.broker.queues.app import EMBED, GENERATE, RUN, node_message
from perllm.broker.vectors import unpack

CONTEXT = 100_000  # tokens
ENDLESS = 90_000  # tokens: 15 minutes


@pytest.fixture(scope="module")
def cluster(own_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"slots": 2, "emulated_speed": 100, "context": CONTEXT, "lease": 30, "log_level": "debug"}
    with Cluster(own_server.url, tmp_path_factory.mktemp("cluster"), **settings) as one:
        one.start_inbox()
        one.scheduler()
        one.start_nodes("a", "b")
        yield one


@pytest.fixture(scope="module")
def producer(cluster: Cluster) -> celery.Celery:
    return cluster.producer()


def send(producer: celery.Celery, *args: object, task_id: str | None = None, **fields: object) -> AsyncResult:
    return producer.send_task(GENERATE, args=args, kwargs=fields, queue="inbox", task_id=task_id)


# --- every final state ends the producer's wait


def test_succeeded(cluster: Cluster, producer: celery.Celery) -> None:
    sent = send(producer, prompt="hello", max_tokens=3, deadline=600)
    result = sent.get(timeout=PATIENCE)
    assert (result["id"], result["state"], result["on_time"]) == (sent.id, "succeeded", True)
    assert result["output"]["text"] == "word word word"
    assert result["receipt"]["node"] in ("a", "b")
    assert result["receipt"]["energy"]["method"] == "emulated"
    assert AsyncResult(sent.id, app=producer).get(timeout=PATIENCE) == result  # also for who asks afterwards
    assert AsyncResult(sent.id, app=producer).state == "SUCCESS"


@pytest.mark.parametrize(
    ("args", "kwargs", "count"),
    [
        ((), {"inputs": ["a", "b"]}, 2),
        ((["a", "b"],), {"dimensions": 8}, 2),
        (("a",), {}, 1),
        (({"inputs": ["a"]},), {}, 1),
    ],
)
def test_texts_are_embedded(producer: celery.Celery, args: Any, kwargs: Any, count: int) -> None:
    result = producer.send_task(EMBED, args=args, kwargs=kwargs, queue="inbox").get(timeout=PATIENCE)
    vectors = [unpack(vector) for vector in result["output"]["vectors"]]
    assert [len(vector) for vector in vectors] == [kwargs.get("dimensions", 384)] * count


def test_what_cannot_be_embedded_is_told(producer: celery.Celery) -> None:
    with pytest.raises(InvalidTask, match="give 'inputs': what to embed"):
        producer.send_task(EMBED, kwargs={"inputs": []}, queue="inbox").get(timeout=PATIENCE)


def test_failed(producer: celery.Celery) -> None:
    """More than the engine can hold, by its own count."""
    with pytest.raises(TaskFailed, match=r"exceed the context of 100000"):
        send(producer, prompt="x" * 600_000, max_tokens=1).get(timeout=PATIENCE)


def test_expired_while_running(cluster: Cluster, producer: celery.Celery) -> None:
    sent = send(producer, prompt="hello", max_tokens=ENDLESS, deadline=2)
    with pytest.raises(TaskExpired, match=r"the deadline passed after \d+ tokens"):
        sent.get(timeout=PATIENCE)
    result = cluster.result(sent.id)
    assert result.receipt is not None
    assert 0 < result.receipt.completion_tokens == len(result.text.split())


def test_expired_while_pending(cluster: Cluster, producer: celery.Celery) -> None:
    (task_id,) = cluster.submit(model="nobody-has-it", deadline=0.3)
    with pytest.raises(TaskExpired, match="the deadline passed before a node could take it"):
        AsyncResult(task_id, app=producer).get(timeout=PATIENCE)


def test_rejected(cluster: Cluster, producer: celery.Celery) -> None:
    sent = send(producer, prompt="x" * 900_000, max_tokens=1)
    with pytest.raises(TaskRejected, match="the largest context offered is 100000"):
        sent.get(timeout=PATIENCE)
    why = cluster.task(sent.id).why
    assert why is not None
    assert why.action == "reject"


def test_cancelled_while_running(cluster: Cluster, producer: celery.Celery) -> None:
    sent = send(producer, prompt="hello", max_tokens=ENDLESS, deadline=600)
    eventually(lambda: cluster.ledger.known([sent.id])[0], "it is handed in")
    node = cluster.await_state(sent.id, "running").node
    beats = {info.name: beat for info, beat, _ in cluster.ledger.nodes()}
    assert cluster.ledger.cancel(sent.id) == "running"
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=PATIENCE)
    assert sent.state == "REVOKED"

    def stopped() -> bool:
        beat = {info.name: beat for info, beat, _ in cluster.ledger.nodes()}[node]
        return beat is not None and beat != beats[node] and not beat.progress

    eventually(stopped, "the engine has stopped")


# --- what a producer may send


def test_one_object_instead_of_keywords(producer: celery.Celery) -> None:
    result = send(producer, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}).get(timeout=PATIENCE)
    assert result["state"] == "succeeded"


def test_the_older_message_protocol(cluster: Cluster) -> None:
    old = cluster.producer()
    old.conf.task_protocol = 1
    assert send(old, prompt="hello", max_tokens=1).get(timeout=PATIENCE)["state"] == "succeeded"


@pytest.mark.parametrize(
    ("args", "fields", "says"),
    [
        ([], {}, "give exactly one of 'prompt', 'prompt_ids' and 'messages'"),
        ([], {"prompt": "hi", "colour": "blue"}, "colour: "),
        ([], {"prompt": "hi", "deadline": -1, "value": "much"}, r"deadline: .*; value: "),
        ([], {"prompt": ""}, "prompt: "),
        ([], {"prompt": "x" * (1 << 21)}, "PERLLM_MAX_PROMPT_BYTES"),
        ([], {"prompt": "hi", "model": "nobody-has-it"}, "model: no live node serves 'nobody-has-it'; .*emulated"),
        ([], {"prompt": "hi", "max_tokens": CONTEXT}, "max_tokens: .*100000"),
        (["hi"], {}, "keyword arguments, or as one object"),
        ([{"prompt": "hi"}], {"prompt": "hi"}, "keyword arguments, or as one object"),
    ],
)
def test_an_invalid_task_is_told_to_its_producer(
    cluster: Cluster, producer: celery.Celery, args: list[Any], fields: dict[str, Any], says: str
) -> None:
    sent = send(producer, *args, **fields)
    with pytest.raises(InvalidTask, match=says):
        sent.get(timeout=PATIENCE)
    assert cluster.ledger.known([sent.id]) == [False]


@pytest.mark.parametrize("task_id", ["@preview@", "with space", "x" * 256, "naïve"])
def test_an_id_that_cannot_be(producer: celery.Celery, task_id: str) -> None:
    with pytest.raises(InvalidTask, match="the message's id must be"):
        send(producer, prompt="hi", task_id=task_id).get(timeout=PATIENCE)


def test_the_producers_own_id_and_the_same_message_twice(cluster: Cluster, producer: celery.Celery) -> None:
    task_id = f"order:{new_id()}"
    first = send(producer, prompt="hello", max_tokens=1, task_id=task_id).get(timeout=PATIENCE)
    assert first["id"] == task_id
    assert send(producer, prompt="hello", max_tokens=1, task_id=task_id).get(timeout=PATIENCE) == first


def test_a_key_that_another_task_has(producer: celery.Celery) -> None:
    key = new_id()
    first = send(producer, prompt="hello", max_tokens=1, idempotency_key=key)
    first.get(timeout=PATIENCE)
    with pytest.raises(InvalidTask, match=f"idempotency_key: '{key}' is task {first.id}'s"):
        send(producer, prompt="hello", max_tokens=1, idempotency_key=key).get(timeout=PATIENCE)


# --- messages


def test_a_node_message_is_what_celery_would_send(cluster: Cluster) -> None:
    task_id, producer = new_id(), cluster.producer(unbound=True)
    with producer.connection_for_write() as connection:
        producer.send_task(RUN, kwargs={"attempt": 1, "v": 1}, queue="shapes", task_id=task_id, connection=connection)
    theirs = json.loads(redis_of(cluster.ledger).rpop("shapes") or b"")
    ours = json.loads(node_message(task_id, 1, "shapes"))
    assert ours.keys() == theirs.keys()
    assert ours["headers"].keys() == theirs["headers"].keys()
    assert ours["properties"].keys() == theirs["properties"].keys()
    decoded = [Channel.codecs["base64"].decode(m["body"]) for m in (ours, theirs)]
    assert json.loads(decoded[0]) == json.loads(decoded[1])
    chosen = {"argsrepr", "kwargsrepr", "origin", "ignore_result"}
    assert {k: v for k, v in ours["headers"].items() if k not in chosen} == {
        k: v for k, v in theirs["headers"].items() if k not in chosen
    }
    fresh = {"delivery_tag", "reply_to"}
    assert {k: v for k, v in ours["properties"].items() if k not in fresh} == {
        k: v for k, v in theirs["properties"].items() if k not in fresh
    }


def test_foreign_entries_do_not_keep_neighbours_from_running(cluster: Cluster, producer: celery.Celery) -> None:
    """Of each more than the worker has places for, so that one it did not give back would be missed."""
    redis = redis_of(cluster.ledger)
    queues = ["inbox", "edge.a", "edge.b"]
    for raw in POISON.values():
        for queue in queues:
            redis.lpush(queue, *[raw] * 5)
    sent = [send(producer, prompt="hello", max_tokens=1, deadline=600) for _ in range(20)]
    results = [s.get(timeout=PATIENCE) for s in sent]
    assert {r["state"] for r in results} == {"succeeded"}
    assert {r["receipt"]["node"] for r in results} == {"a", "b"}
    eventually(lambda: not any(map(redis.llen, queues)) and not redis.hlen("unacked"), "nothing is left over")
    for process in cluster.processes:
        assert process.running
    nodes = [p for p in cluster.processes if p.name in ("a", "b")]
    assert all("foreign_message" in p.output for p in nodes)


def test_what_a_killed_inbox_had_taken_is_taken_up_again(cluster: Cluster) -> None:
    """As a killed inbox leaves it: taken from the queue, noted as unacknowledged, two minutes ago."""
    redis = redis_of(cluster.ledger)
    kwargs = {"prompt": "hello", "max_tokens": 1}
    sent = cluster.producer(unbound=True).send_task(GENERATE, kwargs=kwargs, queue="held")
    raw = json.loads(redis.rpop("held") or b"")
    raw["properties"]["delivery_info"]["routing_key"] = "inbox"
    tag = raw["properties"]["delivery_tag"]
    redis.hset("unacked", tag, json.dumps([raw, "", "inbox"]))
    redis.zadd("unacked_index", {tag: cluster.ledger.now() - 120})
    second = cluster.start_worker("broker", "inbox-2")
    assert sent.get(timeout=PATIENCE)["state"] == "succeeded"  # by either
    cluster.watch(second, lambda: "ready" in second.output, "is ready")
    assert second.stop() == 0


def test_a_full_server_does_not_end_the_inbox_nor_lose_what_it_had_taken(
    cluster: Cluster, producer: celery.Celery
) -> None:
    inbox = next(p for p in cluster.processes if p.name == "inbox")
    inbox.signal(signal.SIGSTOP)
    sent = [send(producer, prompt="hello", max_tokens=1, deadline=600) for _ in range(6)]
    redis_of(cluster.ledger).config_set("maxmemory", 1)
    try:
        inbox.signal(signal.SIGCONT)
        cluster.watch(inbox, lambda: inbox.output.count("submission_delayed") > 4, "tries to hand them in")
        assert redis_of(cluster.ledger).hlen("unacked") == 4  # who kills it now loses nothing
        with pytest.raises(OperationalError, match="maxmemory"):
            producer.send_task(GENERATE, kwargs={"prompt": "hello"}, queue="inbox", retry=False)
    finally:
        redis_of(cluster.ledger).config_set("maxmemory", 0)
    assert {s.get(timeout=PATIENCE)["state"] for s in sent} == {"succeeded"}


def test_no_secret_is_in_a_log(cluster: Cluster) -> None:
    for process in cluster.processes:
        for role in users.ROLES:
            assert users.password(role) not in process.output, process.name


def test_nobody_needed_more_than_the_rights_of_their_role(cluster: Cluster, own_server: Server) -> None:
    """The last one here: whatever ran before it ran as the users of compose/users.acl."""
    assert cluster.url_of("worker") != own_server.url
    assert users.denied(own_server.url) == []
