"""The whole path with real processes (scheduler, two edge nodes, inbox) and the emulated engine, on each server, as
producers with plain Celery see it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import celery
import pytest
from celery import chain, chord, group
from celery.canvas import Signature
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import AsyncResult, GroupResult
from kombu.exceptions import OperationalError
from kombu.transport.redis import Channel
from support import users
from support.cluster import Cluster
from support.poison import POISON
from support.raw import redis_of
from support.servers import Server
from support.wait import PATIENCE, eventually

from perllm.broker.errors import InvalidTask, TaskExpired, TaskFailed, TaskRejected
from perllm.broker.messages import TaskSpec, new_id
from perllm.broker.queues.app import EMBED, GENERATE, RUN, node_message

CONTEXT = 100_000  # tokens
ENDLESS = 90_000  # tokens: 15 minutes


@pytest.fixture(scope="module")
def cluster(own_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"slots": 2, "emulated_speed": 100, "context": CONTEXT, "lease": 30, "log_level": "debug"}
    with Cluster(own_server.url, tmp_path_factory.mktemp("cluster"), **settings) as one:
        one.start_inbox()
        application = one.start_application()
        one.scheduler()
        one.start_nodes("a", "b")
        one.watch(application, lambda: redis_of(one.ledger).exists("_kombu.binding.celery"), "listens")
        yield one


@pytest.fixture(scope="module")
def producer(cluster: Cluster) -> celery.Celery:
    return cluster.producer()


def send(producer: celery.Celery, *args: object, task_id: str | None = None, **fields: object) -> AsyncResult:
    return producer.send_task(GENERATE, args=args, kwargs=fields, queue="inbox", task_id=task_id)


# --- every final state ends the producer's wait


def test_succeeded(cluster: Cluster, producer: celery.Celery) -> None:
    traced = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    fields = {"prompt": "hello", "max_tokens": 3, "deadline": 600}
    sent = producer.send_task(GENERATE, kwargs=fields, queue="inbox", headers=traced)
    result = sent.get(timeout=PATIENCE)
    assert cluster.task(sent.id).spec.origin() == {"trace_id": "a" * 32}
    assert (result["id"], result["state"], result["on_time"]) == (sent.id, "succeeded", True)
    assert result["output"]["text"] == "word word word"
    assert result["receipt"]["node"] in ("a", "b")
    assert result["receipt"]["energy"]["method"] == "emulated"
    assert AsyncResult(sent.id, app=producer).get(timeout=PATIENCE) == result  # also for who asks afterwards
    assert AsyncResult(sent.id, app=producer).state == "SUCCESS"


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
        ([], {}, "give exactly one of 'prompt'"),
        ([], {"prompt": "hi", "colour": "blue"}, "colour: "),
        ([], {"prompt": "hi", "deadline": -1, "value": "much"}, r"deadline: .*; value: "),
        ([], {"prompt": ""}, "prompt: "),
        ([], {"prompt": "x" * (1 << 21)}, "PERLLM_MAX_PROMPT_BYTES"),
        ([], {"prompt": "hi", "model": "nobody-has-it"}, "model: no live node serves 'nobody-has-it'; .*emulated"),
        ([], {"prompt": "hi", "max_tokens": CONTEXT}, "max_tokens: .*100000"),
        (["hi", "there"], {}, "keyword arguments, or as one object"),
        ([{"text": "hi"}], {}, "text: Extra inputs"),
        ([True], {}, "a positional argument is text, .* not bool"),
        ([{"prompt": "hi"}], {"prompt": "hi"}, "prompt: given twice"),
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


# --- what follows a task


def generate(
    producer: celery.Celery, *, immutable: bool = False, queue: str | None = "inbox", **fields: Any
) -> Signature:
    usual = {"max_tokens": 2, "deadline": 600}
    options = {} if queue is None else {"queue": queue}
    return producer.signature("perllm.generate", kwargs=usual | fields, immutable=immutable, **options)


def own(producer: celery.Celery, task: str, *args: Any, **options: Any) -> Signature:
    """A task of the application's; without a queue, its worker listens to Celery's default one."""
    return producer.signature(f"application.{task}", args=args, **options)


def words(answer: Any) -> int:
    return len(answer["output"]["text"].split())


def prompt_of(cluster: Cluster, result: AsyncResult) -> str | None:
    return cluster.task(result.id).spec.prompt


def test_a_chain_passes_on_its_texts(cluster: Cluster, producer: celery.Celery) -> None:
    last = chain(
        generate(producer, prompt="one", max_tokens=3),
        generate(producer, queue=None),
        generate(producer, prompt="Shorten this:", max_tokens=1),
        generate(producer, messages=[{"role": "system", "content": "Be kind."}]),
        generate(producer, immutable=True, prompt="alone", max_tokens=4),
    )()
    answer = last.get(timeout=PATIENCE)
    assert (answer["id"], words(answer)) == (last.id, 4)
    fourth, third, second = last.parent, last.parent.parent, last.parent.parent.parent
    assert prompt_of(cluster, second) == "word word word"
    assert prompt_of(cluster, third) == "Shorten this:\n\nword word"
    turns = cluster.task(fourth.id).spec.messages or ()
    assert [(t.role, t.content) for t in turns] == [("system", "Be kind."), ("user", "word")]
    assert prompt_of(cluster, last) == "alone"
    assert second.get()["id"] == second.id


def test_a_chord_and_groups_within_chains(cluster: Cluster, producer: celery.Celery) -> None:
    joined = chord([generate(producer, prompt=str(n)) for n in range(3)], generate(producer, max_tokens=4))()
    assert words(joined.get(timeout=PATIENCE)) == 4
    assert prompt_of(cluster, joined) == "word word\n\nword word\n\nword word"
    header = [chain(generate(producer, prompt="a"), group(generate(producer), generate(producer, max_tokens=1)))]
    nested = chain(group([*header, generate(producer, prompt="b")]), generate(producer), generate(producer))()
    assert words(nested.get(timeout=PATIENCE)) == 2
    fan = chain(generate(producer, prompt="a"), group(generate(producer, max_tokens=n) for n in (1, 2)))()
    assert [words(answer) for answer in fan.get(timeout=PATIENCE)] == [1, 2]


def test_texts_are_embedded(cluster: Cluster, producer: celery.Celery) -> None:
    def embed(**fields: Any) -> Signature:
        return producer.signature(EMBED, kwargs=fields, queue="inbox")

    assert len(embed(inputs=["a", "b"], kind="generate").apply_async().get(timeout=PATIENCE)["output"]["vectors"]) == 2
    joined = chord([generate(producer, prompt=str(n), max_tokens=1) for n in range(2)], embed(inputs=["alone"]))()
    assert len(joined.get(timeout=PATIENCE)["output"]["vectors"]) == 3
    assert cluster.task(joined.id).spec.inputs == ("alone", "word", "word")
    with pytest.raises(InvalidTask, match="inputs: "):
        embed(inputs={}).apply_async(("text",)).get(timeout=PATIENCE)


def test_tasks_of_the_producers_own_in_between(cluster: Cluster) -> None:
    producer = cluster.producer("application")
    mixed = chain(own(producer, "ask", "cats"), generate(producer, max_tokens=3), own(producer, "count"))()
    assert mixed.get(timeout=PATIENCE) == 3
    assert prompt_of(cluster, mixed.parent) == "tell me of cats"
    fields = chain(own(producer, "fields", "dogs"), producer.signature(GENERATE, queue="inbox"))()
    assert words(fields.get(timeout=PATIENCE)) == 2
    header = [generate(producer, prompt="a"), chain(generate(producer, prompt="b"), own(producer, "count"))]
    header += [chain(own(producer, "ask", "birds"), generate(producer, max_tokens=5))]
    assert chord(header, own(producer, "total"))().get(timeout=PATIENCE) == 2 + 2 + 5


def test_callbacks(cluster: Cluster, producer: celery.Celery) -> None:
    callbacks = [generate(producer, max_tokens=5), own(producer, "count")]
    results = [callback.freeze() for callback in callbacks]
    sent = generate(producer, prompt="a").apply_async(link=callbacks)
    first, second = (result.get(timeout=PATIENCE) for result in results)
    assert (words(first), second) == (5, 2)
    assert sent.get() == sent.get()


def noted(cluster: Cluster) -> set[str]:
    """Tasks for which the application's error callback was run."""
    return {i.decode() for i in redis_of(cluster.ledger).lrange("app.noted", 0, -1)}


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"prompt": "x" * 600_000, "max_tokens": 1}, TaskFailed), ({"prompt": "a", "colour": "blue"}, InvalidTask)],
)
def test_what_follows_a_failure_fails(
    cluster: Cluster, producer: celery.Celery, fields: dict[str, Any], error: type[Exception]
) -> None:
    """Of one that became a task, and of one that did not."""
    note, body = own(producer, "note"), generate(producer).on_error(own(producer, "note"))
    failing = generate(producer, **fields).on_error(note)
    last = chain(generate(producer, prompt="a"), failing, generate(producer), own(producer, "count"))()
    with pytest.raises(error):
        last.get(timeout=PATIENCE, disable_sync_subtasks=False)
    eventually(lambda: last.state == last.parent.state == "FAILURE", "the rest of the chain has failed too")
    with pytest.raises(error):
        last.get(timeout=PATIENCE, propagate=True)
    joined = chord([generate(producer, prompt="a"), generate(producer, **fields)], body)()
    eventually(lambda: joined.state == "FAILURE", "the chord has failed")
    with pytest.raises(ChordError, match=error.__name__):
        raise joined.result
    eventually(lambda: {last.parent.parent.id, joined.id} <= noted(cluster), "the error callbacks were run")
    assert cluster.ledger.known([last.id, last.parent.id, joined.id]) == [False] * 3


def test_what_follows_a_revoked_task_is_revoked(cluster: Cluster, producer: celery.Celery) -> None:
    endless = generate(producer, prompt="a", max_tokens=ENDLESS).on_error(own(producer, "note"))
    last = chain(endless, generate(producer), generate(producer))()
    first = last.parent.parent
    eventually(lambda: cluster.ledger.known([first.id])[0], "it is handed in")
    first.revoke(terminate=True)
    eventually(lambda: last.state == last.parent.state == first.state == "REVOKED", "all are revoked")
    joined = chord([generate(producer, prompt="a"), endless], generate(producer))()
    joined.parent.revoke()
    eventually(lambda: joined.state == "FAILURE", "the chord fails")
    with pytest.raises(ChordError, match="TaskRevokedError"):
        raise joined.result
    assert first.id not in noted(cluster)


@pytest.mark.parametrize(
    ("follower", "says"),
    [
        ({"queue": "edge.a"}, "nothing can be sent to a queue 'edge.a'"),
        ({"queue": "{perllm}:refused"}, "nothing can be sent to a queue"),
        ({"queue": "elsewhere"}, "the queue 'elsewhere' takes nothing from here: .*[Nn]o permissions"),
        ({"exchange": "", "routing_key": "inbox:unacked"}, "routing_key cannot be given|exchange cannot be given"),
    ],
)
def test_what_cannot_follow_is_refused_with_a_sentence(
    cluster: Cluster, producer: celery.Celery, own_server: Server, follower: dict[str, Any], says: str
) -> None:
    last = chain(generate(producer, prompt="a"), own(producer, "count", **follower), generate(producer))()
    for result in (last.parent.parent, last.parent, last):
        eventually(lambda: result.state == "FAILURE", "it fails")  # noqa: B023
        with pytest.raises(InvalidTask, match=says):
            raise result.result
    assert not cluster.ledger.known([last.parent.parent.id])[0]
    assert set(users.denied(own_server.url)) <= {"inbox: key elsewhere"}


def test_groups_are_saved_restored_and_forgotten(cluster: Cluster, producer: celery.Celery) -> None:
    saved = group(generate(producer, prompt=str(n)) for n in range(3))()
    saved.save()
    restored = GroupResult.restore(saved.id, app=producer)
    assert [words(answer) for answer in restored.get(timeout=PATIENCE)] == [2, 2, 2]
    restored.forget()
    assert {AsyncResult(result.id, app=producer).state for result in saved} == {"PENDING"}
    restored.delete()
    assert GroupResult.restore(saved.id, app=cluster.producer()) is None


# --- what a message's options mean


def test_times_and_priority(cluster: Cluster, producer: celery.Celery) -> None:
    def spec(task_id: str) -> TaskSpec:
        eventually(lambda: cluster.ledger.known([task_id])[0], "it is handed in")
        return cluster.task(task_id).spec

    sent = generate(producer, prompt="a", deadline=600).apply_async(countdown=1, expires=300, priority=3)
    assert spec(sent.id).start_after == pytest.approx(1, abs=0.5)
    assert spec(sent.id).deadline == pytest.approx(300, abs=5)
    assert spec(sent.id).value == 0.5
    assert sent.get(timeout=PATIENCE)["queued"] > spec(sent.id).start_after
    later = [generate(producer, prompt="a", deadline=None).clone() for _ in range(20)]
    for signature in later:
        del signature.kwargs["deadline"]
    ids = [signature.apply_async(countdown=3600).id for signature in later]
    assert spec(ids[-1]).deadline == pytest.approx(3660, abs=5)
    eventually(lambda: all(cluster.ledger.known(ids)), "they are handed in")
    assert {cluster.task(i).state for i in ids} == {"pending"}
    assert not redis_of(cluster.ledger).hlen("inbox:unacked")  # none is held in the inbox's memory
    producer.control.revoke(ids)
    eventually(lambda: {AsyncResult(i, app=producer).state for i in ids} == {"REVOKED"}, "they are revoked")


def test_progress_is_shown_where_it_is_asked_for(producer: celery.Celery) -> None:
    quiet = generate(producer, prompt="a", max_tokens=150).apply_async()
    shown: list[tuple[str, Any]] = []
    asked = generate(producer, prompt="a", max_tokens=150, progress=True).apply_async()
    asked.get(timeout=PATIENCE, on_message=lambda meta: shown.append((meta["status"], meta["result"])))
    assert list(dict.fromkeys(status for status, _ in shown)) == ["STARTED", "PROGRESS", "SUCCESS"]
    tokens = [said["tokens"] for status, said in shown if status == "PROGRESS"]
    assert tokens == sorted(tokens)
    assert 0 < tokens[0] <= tokens[-1] <= 150
    seen: list[str] = []
    quiet.get(timeout=PATIENCE, on_message=lambda meta: seen.append(meta["status"]))
    assert "PROGRESS" not in seen


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
    eventually(lambda: not any(map(redis.llen, queues)) and not redis.hlen("inbox:unacked"), "nothing is left over")
    eventually(lambda: not redis.exists("{perllm}:followers", "{perllm}:to_follow"), "nothing is left to follow")
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
    redis.hset("inbox:unacked", tag, json.dumps([raw, "", "inbox"]))
    redis.zadd("inbox:unacked_index", {tag: cluster.ledger.now() - 120})
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
        cluster.watch(inbox, lambda: inbox.output.count("fetching_delayed") > 1, "tries to fetch them")
        redis = redis_of(cluster.ledger)
        assert redis.hlen("inbox:unacked") + redis.llen("inbox") == 6  # who kills it now loses nothing
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
