"""Celery's remote control against the ledger: one truth about what is revoked, and no command makes a black hole."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import celery
import pytest
from celery import chain
from celery.canvas import Signature
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from kombu import Exchange
from support.cluster import Cluster
from support.make import node_info
from support.raw import prefix_of, redis_of
from support.servers import Server
from support.wait import PATIENCE, eventually

from perllm.broker.messages import Ended, new_id
from perllm.broker.queues.app import GENERATE

ENDLESS = {"prompt": "hello", "max_tokens": 90_000, "deadline": 600}


@pytest.fixture(scope="module")
def cluster(own_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"slots": 1, "emulated_speed": 100, "context": 100_000, "lease": 30, "log_level": "debug"}
    with Cluster(own_server.url, tmp_path_factory.mktemp("revoke"), **settings) as one:
        redis_of(one.ledger).flushall()
        one.start_inbox()
        one.scheduler()
        one.start_nodes("a")
        yield one


@pytest.fixture(scope="module")
def producer(cluster: Cluster) -> celery.Celery:
    """A plain Celery app that may broadcast, as Flower's user may."""
    return cluster.producer(unbound=True)


def send(producer: celery.Celery, **fields: object) -> AsyncResult:
    return producer.send_task(
        GENERATE, kwargs={"prompt": "hello", "max_tokens": 2, "deadline": 600} | fields, queue="inbox"
    )


def revoked(cluster: Cluster, producer: celery.Celery, task_id: str) -> None:
    """It is, by everybody's account, and stays so."""
    with pytest.raises(TaskRevokedError):
        AsyncResult(task_id, app=producer).get(timeout=PATIENCE)
    assert cluster.result(task_id).state == "cancelled"
    assert AsyncResult(task_id, app=producer).state == "REVOKED"
    ends = [e.state for _, e in cluster.ledger.events("0-0", count=100_000) if isinstance(e, Ended) and e.id == task_id]
    assert ends == ["cancelled"]


def works(cluster: Cluster) -> None:
    """The only node does what it is given."""
    (task_id,) = cluster.submit()
    assert cluster.result(task_id).state == "succeeded"


@pytest.mark.parametrize("how", [{}, {"terminate": True}, {"terminate": True, "signal": "SIGKILL"}])
def test_what_runs_is_cancelled_and_stops(cluster: Cluster, producer: celery.Celery, how: dict[str, object]) -> None:
    (task_id,) = cluster.submit(**ENDLESS)
    cluster.await_state(task_id, "running")
    producer.control.revoke(task_id, **how)
    revoked(cluster, producer, task_id)
    works(cluster)  # its one slot is free
    revoked(cluster, producer, task_id)


def test_what_waits_anywhere_is_cancelled(cluster: Cluster, producer: celery.Celery) -> None:
    """One runs; two wait in its node's queue; the rest is pending, and no node has heard of it."""
    ids = cluster.submit(5, **ENDLESS)
    eventually(lambda: {str(cluster.task(i).state) for i in ids} == {"running", "dispatched", "pending"}, "they wait")
    producer.control.revoke(ids)
    for task_id in ids:
        revoked(cluster, producer, task_id)
    works(cluster)


def test_what_is_still_a_message_is_cancelled(cluster: Cluster, producer: celery.Celery) -> None:
    inbox = next(p for p in cluster.processes if p.name == "inbox")
    inbox.signal(signal.SIGSTOP)
    try:
        sent = [send(producer) for _ in range(6)]
        producer.control.terminate([s.id for s in sent], signal="SIGTERM")
        noted = f"{prefix_of(cluster.ledger)}revoked"
        eventually(lambda: redis_of(cluster.ledger).zcard(noted) >= 6, "somebody notes it")
    finally:
        inbox.signal(signal.SIGCONT)
    for result in sent:
        revoked(cluster, producer, result.id)
    assert send(producer).get(timeout=PATIENCE)["state"] == "succeeded"


def test_revoked_at_any_moment_it_has_one_end(cluster: Cluster, producer: celery.Celery) -> None:
    sent = [send(producer, max_tokens=1) for _ in range(30)]
    for n, result in enumerate(sent):
        producer.control.revoke(result.id, terminate=n % 2 == 0)
    said = {"SUCCESS": "succeeded", "REVOKED": "cancelled"}
    for result in sent:
        result.get(timeout=PATIENCE, propagate=False)
        state = AsyncResult(result.id, app=producer).state
        assert cluster.result(result.id).state == said[state]
    works(cluster)


def test_a_killed_node_brings_nothing_revoked_back(cluster: Cluster, producer: celery.Celery) -> None:
    (task_id,) = cluster.submit(**ENDLESS)
    cluster.await_state(task_id, "running")
    node = next(p for p in cluster.processes if p.name == "a")
    node.signal(signal.SIGSTOP)
    producer.control.revoke(task_id, terminate=True)  # the inbox hears it
    revoked(cluster, producer, task_id)
    node.signal(signal.SIGCONT)
    works(cluster)
    revoked(cluster, producer, task_id)


COMMANDS: dict[str, dict[str, object]] = {
    "cancel_consumer": {"queue": "edge.a"},
    "add_consumer": {"queue": "inbox"},
    "rate_limit": {"task_name": "perllm.run", "rate_limit": "1/h"},
    "time_limit": {"task_name": "perllm.run", "soft": 0.001, "hard": 0.001},
    "pool_shrink": {"n": 1},
    "pool_grow": {"n": 1000},
    "pool_restart": {},
    "autoscale": {"max": 0, "min": 0},
    "shutdown": {},
    "hello": {"from_node": "x", "revoked": ["t"]},
    "election": {"id": "x", "topic": "y"},
    "revoke_by_stamped_headers": {"headers": {"a": "b"}},
    "disable_events": {},
    "objgraph": {},
    "no such command": {},
}
BOTH = {"a@test", "inbox@test"}


def tell(producer: celery.Celery, command: str, arguments: dict[str, object]) -> dict[str, dict[str, str]]:
    """Every worker's answer."""
    replies = producer.control.broadcast(command, arguments=arguments, reply=True, limit=2, timeout=PATIENCE)
    return {worker: said for reply in replies for worker, said in reply.items()}


def test_no_command_stops_a_node_from_working(cluster: Cluster, producer: celery.Celery) -> None:
    for command, arguments in COMMANDS.items():
        replies = tell(producer, command, arguments)
        assert set(replies) == BOTH, command
        assert all("do not take this command" in said["error"] for said in replies.values()), (command, replies)
    works(cluster)
    assert send(producer).get(timeout=PATIENCE)["state"] == "succeeded"
    assert set(tell(producer, "ping", {})) == set(tell(producer, "stats", {})) == BOTH  # they may be looked at
    assert all(process.running for process in cluster.processes)


def test_a_command_has_no_answer_written_where_its_sender_may_not_write(
    cluster: Cluster, producer: celery.Celery
) -> None:
    """Whoever may broadcast could have the inbox spoil the ledger's keys, and a node another's queue."""
    spoilt, pidbox = [f"{prefix_of(cluster.ledger)}refused", "edge.b"], Exchange("celery.pidbox", type="fanout")
    with producer.connection_for_write() as connection, connection.SimpleQueue("x") as queue:
        for exchange in ("", "inbox", "celery.pidbox", 7, None):
            for key in spoilt:
                command = {"method": "ping", "arguments": {}, "reply_to": {"exchange": exchange, "routing_key": key}}
                queue.producer.publish(command, exchange=pidbox, routing_key="", declare=[pidbox], serializer="json")
    assert set(tell(producer, "ping", {})) == BOTH
    assert not redis_of(cluster.ledger).exists(*spoilt)


@pytest.mark.parametrize("nonsense", [None, 7, {}, [[]], [None, 1, "with space", "x" * 300], "", {"$": 1}])
def test_nonsense_for_an_id_is_passed_over(cluster: Cluster, producer: celery.Celery, nonsense: object) -> None:
    (task_id,) = cluster.submit(**ENDLESS)
    replies = tell(producer, "revoke", {"task_id": nonsense, "terminate": "?"})
    assert all("cancelled 0 of 0" in said["ok"] for said in replies.values())
    producer.control.broadcast("revoke", arguments={"task_id": [nonsense, task_id], "colour": "blue"})
    revoked(cluster, producer, task_id)


# --- what a message's id lets Celery write


def victim(cluster: Cluster) -> str:
    (task_id,) = cluster.submit()
    assert cluster.result(task_id).state == "succeeded"
    return task_id


def test_a_message_that_is_no_task_does_not_write_over_a_result(cluster: Cluster) -> None:
    """Anybody who may send to the inbox could give his message another's id."""
    task_id, plain = victim(cluster), cluster.producer()
    plain.send_task("no.such.task", queue="inbox", task_id=task_id)
    plain.send_task(GENERATE, kwargs={"prompt": "hi", "colour": "blue"}, queue="inbox", task_id=task_id)
    plain.send_task(GENERATE, kwargs={"prompt": "hi"}, queue="inbox", task_id=task_id, expires=-5)
    assert send(plain).get(timeout=PATIENCE)["state"] == "succeeded"  # and so they have been taken up
    assert AsyncResult(task_id, app=plain).state == "SUCCESS"


def test_its_own_producer_is_told(cluster: Cluster) -> None:
    plain = cluster.producer()
    with pytest.raises(Exception, match=r"no task 'no\.such\.task': send 'perllm\.generate'"):
        plain.send_task("no.such.task", queue="inbox").get(timeout=PATIENCE)
    with pytest.raises(TaskRevokedError, match="expired"):
        plain.send_task(GENERATE, kwargs={"prompt": "hi"}, queue="inbox", expires=-5).get(timeout=PATIENCE)
    unwritable = plain.send_task("x\ud800", queue="inbox", task_id=new_id())
    with pytest.raises(Exception, match="no task"):
        unwritable.get(timeout=PATIENCE)


# --- a node that beats and takes up nothing


def test_a_deadline_holds_on_a_node_that_takes_up_nothing(cluster: Cluster) -> None:
    usual = node_info("hole")
    info = usual.model_copy(update={"models": (usual.models[0].model_copy(update={"name": "only-there"}),)})
    cluster.ledger.register(info)  # for the lease of 30 s; it consumes nothing
    (task_id,) = cluster.submit(model="only-there", deadline=2)
    cluster.await_state(task_id, "dispatched")
    result = cluster.result(task_id)
    assert (result.state, result.on_time) == ("expired", False)
    assert 2 <= result.latency < 10  # it was 30
    cluster.ledger.leave("hole", info.boot, "gone")


# --- whoever is killed meanwhile


def test_with_no_scheduler_alive_it_is_cancelled_and_told_by_the_next(
    cluster: Cluster, producer: celery.Celery
) -> None:
    (task_id,) = cluster.submit(**ENDLESS)
    cluster.await_state(task_id, "running")
    scheduler = next(p for p in cluster.processes if p.name == "scheduler" and p.running)
    scheduler.kill()
    producer.control.revoke(task_id)
    assert cluster.await_state(task_id, "cancelled")
    cluster.scheduler()
    revoked(cluster, producer, task_id)
    works(cluster)


def test_the_rest_of_a_chain_is_revoked_though_the_inbox_was_killed(cluster: Cluster, producer: celery.Celery) -> None:
    def signature(**fields: object) -> Signature:
        return producer.signature(GENERATE, kwargs={"prompt": "hi", "max_tokens": 2} | fields, queue="inbox")

    first = signature(**ENDLESS)
    last = chain(first, signature(), signature())()
    ids = [last.id, last.parent.id, last.parent.parent.id]
    eventually(lambda: cluster.ledger.known([ids[2]])[0], "it is handed in")
    inbox = next(p for p in cluster.processes if p.name == "inbox" and p.running)
    inbox.kill()
    producer.control.revoke(ids[2], terminate=True)  # the node hears it
    eventually(lambda: AsyncResult(ids[2], app=producer).state == "REVOKED", "the first is revoked")
    assert AsyncResult(ids[0], app=producer).state == "PENDING"
    cluster.start_inbox()
    eventually(lambda: {AsyncResult(i, app=producer).state for i in ids} == {"REVOKED"}, "all are revoked")
    assert cluster.ledger.known(ids) == [False, False, True]
