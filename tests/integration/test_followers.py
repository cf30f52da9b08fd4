"""What follows a Celery producer's task, sent by hand: again and again, as by who takes over from the dead, and made
of whatever somebody may have written."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery.app import backends
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.canvas import Signature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.raw import redis_of

from perllm.broker.api.settings import ApiSettings
from perllm.broker.errors import InvalidTask, Unreachable
from perllm.broker.inbox.arguments import Expired, fields_of, with_options
from perllm.broker.inbox.events import Events
from perllm.broker.inbox.followers import MAX_BYTES, MAX_SIGNATURES, Followers
from perllm.broker.inbox.inbox import Inbox
from perllm.broker.inbox.sender import Sender, Unsendable
from perllm.broker.ledger import Ledger
from perllm.broker.messages import MAX_DEADLINE, State
from perllm.broker.queues.app import make_app

ANSWER = {"id": "t", "state": "succeeded", "output": {"text": "some text"}}


@pytest.fixture
def sender(settings: ApiSettings, ledger: Ledger) -> Iterator[Sender]:
    one = Inbox(settings, ledger, Events(make_app(settings))).sender
    yield one
    one._app.close()


def signature(task: str = "perllm.generate", **options: Any) -> dict[str, Any]:
    return dict(Signature(task, kwargs={"prompt": "hi"}, options=options))


def followers(task_id: str = "t", **given: Any) -> Followers:
    message = {"id": task_id, "group": None, "group_index": None, "root_id": None, "chord": None, "chain": None}
    found = Followers.of(Context(message | {"callbacks": None, "errbacks": None} | given))
    assert found is not None
    return Followers.model_validate_json(found.checked(task_id).written())


def prompts(ledger: Ledger) -> dict[str, str | None]:
    """Of all tasks."""
    return {task.id: task.spec.prompt for task in ledger.legible(ledger.ids(State.PENDING))}


def messages(ledger: Ledger, queue: str) -> list[tuple[str, list[Any]]]:
    """Of what was sent to a queue, oldest first: the id, and the positional arguments."""
    raw = [json.loads(entry) for entry in redis_of(ledger).lrange(queue, 0, -1)[::-1]]
    return [(one["headers"]["id"], json.loads(base64.b64decode(one["body"]))[0]) for one in raw]


def test_what_is_sent_again_has_its_first_id(sender: Sender, ledger: Ledger) -> None:
    """So that a task of ours is one, however often an inbox dies between sending it and saying so."""
    mine = [signature("my.task", queue="app.x"), signature()]
    what = followers(callbacks=mine, errbacks=mine[:1], chain=[signature(task_id="c")])
    first, second = (callback["options"]["task_id"] for callback in what.callbacks)
    for _ in range(2):
        sender.succeeded("t", what, ANSWER)
    assert prompts(ledger) == {second: "hi\n\nsome text", "c": "hi\n\nsome text"}
    assert messages(ledger, "app.x") == [(first, [ANSWER])] * 2
    what = followers(errbacks=mine[:1], chain=[signature(task_id="d")])
    for _ in range(2):
        sender.failed("t", what, "failed", "because")
    assert messages(ledger, "app.x")[2:] == [(what.errbacks[0]["options"]["task_id"], ["t"])] * 2
    ledger.announce()
    told = json.loads(redis_of(ledger).get("celery-task-meta-d") or b"")
    assert (told["status"], told["result"]["exc_type"], told["result"]["exc_message"]) == (
        "FAILURE",
        "TaskFailed",
        ["because"],
    )


PARTS = 4


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    order=st.lists(st.integers(0, PARTS - 1), min_size=PARTS, max_size=3 * PARTS),
    failing=st.none() | st.integers(0, PARTS - 1),
    outages=st.sets(st.integers(0, 2 * PARTS)),
)
def test_a_chord_is_completed_once_however_its_parts_return(
    sender: Sender, ledger: Ledger, order: list[int], failing: int | None, outages: set[int]
) -> None:
    """In any order, again and again, with a server that is too full to take the body, and claims of who has died."""
    server = redis_of(ledger)
    server.flushall()
    server.set("celery-taskset-meta-g.s", PARTS)
    order += [n for n in range(PARTS) if n not in order]
    body = signature(task_id="body")
    parts = [followers(f"t{n}", chord=body, group="g", group_index=n) for n in range(PARTS)]
    for step, n in enumerate(order):
        if step in outages:
            server.config_set("maxmemory", 1)
        while True:
            try:
                if n == failing:
                    sender.failed(f"t{n}", parts[n], "expired", "too late")
                else:
                    sender.succeeded(f"t{n}", parts[n], f"text {n}")
                break
            except Unreachable:
                server.config_set("maxmemory", 0)
                server.delete("celery-taskset-meta-g.c")  # moves time: the claim of who died lapses
        server.config_set("maxmemory", 0)
    if failing is None:
        assert prompts(ledger) == {"body": "\n\n".join(["hi", *(f"text {n}" for n in range(PARTS))])}
    else:
        assert prompts(ledger) == {}
        ledger.announce()
        told = json.loads(server.get("celery-task-meta-body") or b"")
        assert told["result"]["exc_type"] == "ChordError"
        assert "TaskExpired: too late" in told["result"]["exc_message"][0]


def test_celerys_own_workers_count_the_same_chord(sender: Sender, ledger: Ledger) -> None:
    """As they do, for parts that are tasks of the producer's own."""
    theirs = RedisBackend(app=sender._app, url=backends.by_url(sender._app.conf.result_backend)[1])
    body = signature("my.sum", task_id="body", queue="app.x")
    theirs.set_chord_size("g", 3)
    for n in range(3):
        if n == 1:
            sender.succeeded("t1", followers("t1", chord=body, group="g", group_index=1), "ours")
        else:
            request = Context({"id": f"t{n}", "group": "g", "group_index": n, "chord": body})
            theirs.on_chord_part_return(request, "SUCCESS", f"theirs {n}")
    assert messages(ledger, "app.x") == [("body", [["theirs 0", "ours", "theirs 2"]])]


# --- what somebody may have written


def nested(depth: int) -> dict[str, Any]:
    inner = signature()
    for _ in range(depth):
        inner = signature(link=[inner])
    return inner


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"callbacks": [signature()] * (MAX_SIGNATURES + 1)}, "too much"),
        ({"callbacks": [signature(headers={"x": "x" * MAX_BYTES})]}, "too much"),
        ({"callbacks": [signature(link=["x" * 800])] * 600}, "too much"),
        ({"callbacks": [nested(30)]}, "nested deeper"),
        ({"callbacks": [{"task": "x"}]}, "must be Celery's signatures"),
        ({"callbacks": ["x"]}, "must be Celery's signatures"),
        ({"callbacks": {"task": "x"}}, "must be Celery's signatures"),
        ({"chain": [signature(task_id="with space")]}, "its id must be"),
        ({"chain": [signature() | {"subtask_type": "bomb"}]}, "no signature of Celery's"),
        ({"chain": [signature() | {"args": "hi"}]}, "its arguments as a list"),
        ({"chain": [signature(exchange="x")]}, "exchange cannot be given"),
        ({"chain": [signature(queue="cloud.c1")]}, "nothing can be sent to a queue 'cloud.c1'"),
        ({"chain": [signature(queue=["inbox"])]}, "nothing can be sent to a queue"),
        ({"chain": [signature("x\ud800")]}, "what follows it"),
        ({"chord": signature()}, "the message names no group"),
        ({"errbacks": [signature()]}, "make it immutable"),
    ],
)
def test_what_cannot_follow_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTask, match=says):
        followers(**given)


def test_what_names_no_queue_needs_a_worker_of_celerys_default_one(sender: Sender, ledger: Ledger) -> None:
    what = followers(callbacks=[signature("my.task")])
    with pytest.raises(InvalidTask, match=r"my\.task: it names no queue, and nobody has ever listened"):
        sender.check(what)
    redis_of(ledger).sadd("_kombu.binding.celery", "celery")
    sender.check(what)
    redis_of(ledger).set("celery", "no list")
    with pytest.raises(InvalidTask, match=r"my\.task: the queue 'celery' takes nothing from here: .*WRONGTYPE"):
        sender.check(what)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
OPTIONS = st.dictionaries(
    st.sampled_from(["task_id", "queue", "link", "chord", "chain", "countdown", "eta", "expires", "priority", "headers",
                     "group_id", "group_index", "retry_policy", "producer", "connection", "router", "serializer",
                     "stamped_headers", "ignore_result"]),
    JSON, max_size=4,
)  # fmt: skip
SIGNATURES = st.builds(
    dict,
    task=st.sampled_from(["perllm.generate", "celery.chain", "celery.group", "my.task"]) | st.text(max_size=5),
    args=st.lists(JSON, max_size=2) | JSON,
    kwargs=st.dictionaries(st.sampled_from(["tasks", "header", "body", "task", "it", "n"]), JSON, max_size=3) | JSON,
    options=OPTIONS,
    subtask_type=st.sampled_from([None, None, "chain", "group", "chord", "xmap", "xstarmap", "chunks"]) | JSON,
    immutable=st.booleans(),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    callbacks=st.lists(SIGNATURES, max_size=2) | JSON,
    chain=st.lists(SIGNATURES, max_size=2) | JSON,
    chord=st.none() | SIGNATURES | JSON,
    group=st.none() | st.text(min_size=1, max_size=5) | JSON,
    index=st.none() | st.integers(0, 5) | JSON,
)
def test_whatever_it_is_it_is_sent_or_refused(
    sender: Sender, ledger: Ledger, callbacks: Any, chain: Any, chord: Any, group: Any, index: Any
) -> None:
    try:
        what = followers(callbacks=callbacks, chain=chain, chord=chord, group=group, group_index=index)
        sender.check(what)
    except (InvalidTask, AssertionError):
        return
    for send in (
        lambda: sender.succeeded("t", what, ANSWER),
        lambda: sender.failed("t", what, "failed", "because"),
    ):
        try:
            send()
        except Unsendable:
            sender.refuse(what, "because")


@given(args=st.lists(JSON, max_size=2), kwargs=st.dictionaries(st.sampled_from(["prompt", "messages", "x"]), JSON))
def test_any_arguments_are_fields_or_refused(args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        fields = fields_of(args, kwargs)
    except InvalidTask:
        return
    assert kwargs.keys() <= fields.keys() or len(args) == 1


@given(
    eta=st.none() | st.text(max_size=30) | st.datetimes().map(str),
    expires=st.none() | st.text(max_size=30) | st.datetimes().map(str),
    priority=JSON,
    fields=st.dictionaries(st.sampled_from(["deadline", "value"]), JSON),
)
def test_any_options_are_fields_or_refused(
    eta: str | None, expires: str | None, priority: Any, fields: dict[str, Any]
) -> None:
    try:
        made = with_options(fields, eta, expires, priority, lambda: 1.8e9)
    except Expired:
        assert expires is not None
        return
    except InvalidTask:
        return
    assert made.get("start_after", 1) > 0
    if isinstance(priority, int) and "value" not in fields and priority > 0:
        assert 0 < made["value"] < 1
    if expires is not None and "deadline" not in fields:
        assert 0 < made["deadline"] <= MAX_DEADLINE
