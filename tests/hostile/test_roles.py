"""Whoever has a role's password: he runs no code of his own on the server, and forges nothing that is another role's.

What stays possible is in docs/security.md: a producer may spoil the task records and sets that submitting needs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.result import AsyncResult
from support import users
from support.cluster import Cluster
from support.make import node_info, output, receipt, why
from support.raw import redis_of
from support.servers import Server
from support.wait import eventually

from perllm.broker import functions
from perllm.broker.cli import ledger as ledger_cli
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.ledger.script import LEDGER
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State, TaskSpec
from perllm.broker.queues.app import node_message
from perllm.broker.settings import Settings

NOT_TRUSTED = ("producer", "api", "webhooks", "inbox", "monitor")
P = "{perllm}:"


def client_of(role: str, server: Server) -> redis.Redis:
    return redis.Redis.from_url(users.url_of(role, server.url))


def ledger_of(role: str, server: Server) -> Ledger:
    url = users.url_of(role, server.url) if role else server.url
    return Ledger(Settings.model_validate({"redis_url": url, "lease": 300, "heartbeat": 60}))


@pytest.fixture
def ledger(own_server: Server) -> Iterator[Ledger]:
    """The tests' own, on an empty server that has the users: node n, and the task `running` on it."""
    one = ledger_of("", own_server)
    redis_of(one).flushall()
    one.register(node_info("n"))
    one.submit([(task_id, TaskSpec(prompt="hi", deadline=3600)) for task_id in ("pending", "running")])
    sent = Dispatch("running", 1, "n", "boot-1", "emulated", "edge.n", node_message("running", 1, "edge.n"), why())
    assert one.dispatch(one.lead("test", 600) or 0, [sent]) == ["ok"]
    assert one.claim("running", 1, "n", "token") is not None
    yield one
    one.close()


# --- code of his own

ENDLESS = "while true do end"
CODE: list[tuple[str, ...]] = [
    ("EVAL", ENDLESS, "0"),
    ("EVAL_RO", ENDLESS, "0"),
    ("EVALSHA", "0" * 40, "0"),
    ("SCRIPT", "LOAD", ENDLESS),
    ("SCRIPT", "FLUSH"),
    ("FUNCTION", "LOAD", "REPLACE", LEDGER.source),
    ("FUNCTION", "DELETE", LEDGER.name),
    ("FUNCTION", "FLUSH"),
    ("FUNCTION", "RESTORE", "x"),
]


@pytest.mark.parametrize("role", users.ROLES)
def test_no_role_runs_code_of_its_own(role: str, own_server: Server, ledger: Ledger) -> None:
    with client_of(role, own_server) as client:
        for command in CODE:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
    assert ledger.submit([("next", TaskSpec(prompt="hi"))]) == ["next"]


def test_one_call_does_not_hold_the_server_for_long(own_server: Server, ledger: Ledger) -> None:
    with client_of("producer", own_server) as client:
        task = ["{}", '{"type":"submitted"}', "60", "", "default"]
        many = [word for n in range(50_000) for word in (f"t{n}", *task)]
        with pytest.raises(redis.exceptions.ResponseError, match="too many tasks at once"):
            client.execute_command("FCALL", f"{LEDGER.name}_submit", 1, P, "submit", 1000, 60, *many)
    assert ledger.known(["t0"]) == [False]


def test_calls_past_the_memory_limit_or_into_other_keys_are_refused(own_server: Server, ledger: Ledger) -> None:
    """`submit` by the function that runs on a full server; and prefixes under which he may read any may:<operation>."""
    task = [1000, 60, "t", "{}", '{"type":"submitted"}', "60", "", "default"]
    before = set(redis_of(ledger).scan_iter())
    with client_of("producer", own_server) as client:
        with pytest.raises(redis.exceptions.ResponseError, match="unknown operation"):
            client.execute_command("FCALL", f"{LEDGER.name}_call", 1, P, "submit", *task)
        for prefix in (f"{P}task:", "inbox", f"{P}task:x", ""):
            with pytest.raises(redis.exceptions.ResponseError):
                client.execute_command("FCALL", f"{LEDGER.name}_call", 1, prefix, "lead", 1000, 60, "me", 60)
    assert set(redis_of(ledger).scan_iter()) == before


# --- what others would believe

DOWN = json.dumps({"type": "node_down", "at": 1.0, "node": "n", "reason": "forged"})
DONE = json.dumps({"id": "pending", "state": "succeeded", "on_time": True, "latency": 1.0})
META = json.dumps({"status": "SUCCESS", "result": json.loads(DONE), "task_id": "pending"})
FORGERIES: list[tuple[str, ...]] = [
    ("SET", f"{P}result:pending", DONE),
    ("APPEND", f"{P}result:pending", DONE),
    ("SET", "celery-task-meta-pending", META),
    ("SETEX", "celery-task-meta-pending", "60", META),
    ("PUBLISH", "celery-task-meta-pending", META),
    ("SPUBLISH", "celery-task-meta-pending", META),
    ("XADD", f"{P}events", "*", "e", DOWN),
    ("XDEL", f"{P}events", "0-1"),
    ("HSET", f"{P}node:n", "draining", "1"),
    ("HDEL", f"{P}node:n", "boot"),
    ("SREM", f"{P}node:n:tasks", "running"),
    ("ZADD", f"{P}nodes", "1", "n"),
    ("ZREM", f"{P}nodes", "n"),
    ("SET", f"{P}leader", "me"),
    ("INCR", f"{P}epoch"),
    ("SET", f"{P}snapshot", "{}"),
    ("ZADD", f"{P}in:succeeded", "1", "pending"),
    ("SET", f"{P}in:pending", "x"),
    ("SET", f"{P}requests", "x"),
    ("SET", f"{P}totals", "x"),
    ("DEL", f"{P}in:pending"),
    ("RENAME", f"{P}key:x", f"{P}in:pending"),
    ("COPY", f"{P}task:running", f"{P}result:pending"),
    ("RPUSH", f"{P}text:running", "1 forged"),
    ("LPUSH", "edge.n", "{}"),
    ("SADD", "_kombu.binding.edge.n", "x"),
]


@pytest.mark.parametrize("role", NOT_TRUSTED)
def test_none_of_these_roles_writes_a_result_or_a_nodes_record(role: str, own_server: Server, ledger: Ledger) -> None:
    before = {key: redis_of(ledger).dump(key) for key in redis_of(ledger).scan_iter()}
    with client_of(role, own_server) as client:
        for command in FORGERIES:
            with pytest.raises(redis.exceptions.NoPermissionError):
                print(role, command, client.execute_command(*command))
    assert {key: redis_of(ledger).dump(key) for key in redis_of(ledger).scan_iter()} == before


def test_what_a_producer_writes_of_a_task_is_no_result(own_server: Server, ledger: Ledger) -> None:
    with client_of("producer", own_server) as client:
        client.hset(f"{P}task:pending", mapping={"state": "succeeded", "result": DONE, "finished": "2"})
    assert ledger.results(["pending"]) == [None]
    record = ledger.task("pending")
    assert record is not None
    assert record.result is None


FORGED_EVENTS: list[dict[str, Any]] = [
    {"type": "node_down", "node": "n"},
    {"type": "node_up", "info": node_info("ghost").model_dump(mode="json")},
    {"type": "heartbeat", "node": "n", "boot": "boot-1", "counters": {}},
    {"type": "dispatched", "id": "pending", "node": "n", "model": "emulated", "attempt": 1},
    {"type": "claimed", "id": "pending", "node": "n", "attempt": 1},
    {"type": "returned", "id": "running", "node": "n", "attempt": 1, "cause": "failed"},
    {"type": "ended", "id": "running", "state": "failed"},
    {"type": "ended", "id": "running", "state": "succeeded"},
    {
        "type": "completed", "id": "running", "node": "n", "attempt": 1, "state": "succeeded", "on_time": True,
        "latency": 1.0, "queued": 1.0, "receipt": receipt("n").model_dump(mode="json"),
    },
]  # fmt: skip


def test_a_producers_word_on_nodes_and_results_is_not_believed(own_server: Server, ledger: Ledger) -> None:
    position = ledger.first_and_last_event()[1]
    with client_of("producer", own_server) as client:
        for event in FORGED_EVENTS:
            client.xadd(f"{P}requests", {"e": json.dumps({"at": 1.0, **event})})
    assert ledger.events(position) == []


INJECTION = '1,"type":"node_down","node":"n"'


@pytest.mark.parametrize("field", ["attempt", "strikes", "deadline", "submitted", "claimed", "dispatched", "node"])
@pytest.mark.parametrize("value", [INJECTION, "nan", "inf", "-1", "1e999", "0x10", "", '"'])
def test_a_spoilt_record_says_nothing_in_another_roles_name(
    own_server: Server, ledger: Ledger, field: str, value: str
) -> None:
    """The producer spoils a record; the sweep, with the scheduler's rights, meets it and goes on to others."""
    with client_of("producer", own_server) as client:
        client.hset(f"{P}task:running", field, value)
    position = ledger.first_and_last_event()[1]
    ledger.submit([("other", TaskSpec(prompt="hi"))])
    past = ledger.now() - 1
    redis_of(ledger).zadd(f"{P}in:running", {"running": past})  # moves time
    redis_of(ledger).zadd(f"{P}in:pending", {"other": past})
    ledger_of("scheduler", own_server).sweep()
    assert ledger.states(["other"]) == [State.EXPIRED]
    assert {e.type for _, e in ledger.events(position)} <= {"submitted", "ended", "returned"}


def test_forgetting_a_task_forgets_no_key_its_producer_names(own_server: Server, ledger: Ledger) -> None:
    with client_of("producer", own_server) as client:
        client.hset(f"{P}task:pending", "key", "nodes")
    ledger.cancel("pending")
    redis_of(ledger).zadd(f"{P}in:cancelled", {"pending": 1.0})  # moves time
    assert ledger_of("scheduler", own_server).sweep() == 1
    assert ledger.known(["pending"]) == [False]
    assert [info.name for info, _, _ in ledger.nodes()] == ["n"]


def test_nobody_is_told_of_a_cancellation_that_was_none(own_server: Server, ledger: Ledger) -> None:
    with client_of("producer", own_server) as client:
        client.hset(f"{P}untold", mapping={"running": "n", "nobody": "n", "": "\x00"})
    ledger.announce()
    assert redis_of(ledger).keys("celery-task-meta-*") == []
    assert redis_of(ledger).smembers(f"{P}node:n:tasks") == {b"running"}
    assert ledger.complete("running", 1, "token", "succeeded", output(), receipt("n")) == "ok"


def test_counters_at_their_end_stop_nothing(own_server: Server, ledger: Ledger) -> None:
    with client_of("producer", own_server) as client:
        for name in ("submitted", "succeeded", "cancelled"):
            held = int(client.hget(f"{P}totals", name) or 0)
            client.hincrby(f"{P}totals", name, 2**63 - 1 - held)
    assert ledger.submit([("next", TaskSpec(prompt="hi"))]) == ["next"]
    assert ledger.cancel("next") is State.PENDING
    assert ledger.complete("running", 1, "token", "succeeded", output(), receipt("n")) == "ok"


def test_a_forged_result_and_two_forged_events_change_nothing_that_runs(own_server: Server, tmp_path: Path) -> None:
    """The attack as it was found, on a system that runs."""
    with Cluster(own_server.url, tmp_path) as cluster:
        redis_of(cluster.ledger).flushall()
        cluster.scheduler()
        cluster.start_nodes("a", "b")
        (waits,) = cluster.submit(model=None, deadline=3600, max_tokens=1)
        assert cluster.result(waits).state == "succeeded"
        with client_of("producer", own_server) as client:
            for node in ("a", "b"):
                down = json.dumps({"type": "node_down", "at": time.time(), "node": node, "reason": "forged"})
                client.xadd(f"{P}requests", {"e": down})
        scheduler = next(p for p in cluster.processes if p.name == "scheduler")
        eventually(lambda: scheduler.output.count("event_forged") == 2, "the scheduler has read them")
        done = [cluster.result(i) for i in cluster.submit(6, max_tokens=1)]
        assert {r.state for r in done} == {State.SUCCEEDED}
        assert AsyncResult(waits, app=cluster.producer()).state == "SUCCESS"


# --- the functions on the server


def settings_of(url: str) -> Settings:
    return Settings.model_validate({"redis_url": url})


def test_functions_outlive_the_server_and_its_data(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, users=users.rules())
    for end in (server.kill, server.stop):
        server.start()
        with redis.Redis.from_url(server.url) as admin:
            admin.flushall()
        end()
    path = tmp_path / "valkey.conf"
    server._process = functions_only(server, path)
    with redis.Redis.from_url(server.url) as admin:
        eventually(lambda: _answers(admin), "it answers")
        assert _libraries(admin) == set(functions.Library.known)
    server.stop()


def functions_only(server: EmbeddedServer, config: Path) -> Any:
    """The same server on the same data, started by nobody who loads anything."""
    from perllm.broker.local.process import spawn  # noqa: PLC0415
    from perllm.broker.local.server import get_binary_path  # noqa: PLC0415

    return spawn([str(get_binary_path()), str(config)], server.data_dir / "again.log", folder=server.data_dir)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.exceptions.RedisError:
        return False


def _libraries(admin: redis.Redis) -> set[str]:
    listed = admin.execute_command("FUNCTION", "LIST", "LIBRARYNAME", "perllm_*")
    return {name.decode() for name in functions._names(listed)}


def test_who_may_not_load_them_is_told_how_they_come_there(
    own_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with redis.Redis.from_url(own_server.url) as admin:
        admin.execute_command("FUNCTION", "FLUSH")
    with pytest.raises(Unreachable, match="perllm ledger load"):
        ledger_of("producer", own_server).cancel("t")
    with pytest.raises(Unreachable, match="perllm ledger load"):
        ledger_of("worker", own_server).register(node_info("n"))
    monkeypatch.setenv("PERLLM_REDIS_URL", users.url_of("producer", own_server.url))
    with pytest.raises(Unreachable, match="may not do this"):
        ledger_cli.load()
    monkeypatch.setenv("PERLLM_REDIS_URL", own_server.url)
    ledger_cli.load()
    assert LEDGER.name in capsys.readouterr().out
    assert ledger_of("producer", own_server).cancel("t") is None


def test_versions_lie_side_by_side(own_server: Server, ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    older = LEDGER.name[:-12] + "0" * 12
    redis_of(ledger).execute_command("FUNCTION", "LOAD", LEDGER.source.replace(LEDGER.name, older))
    with client_of("producer", own_server) as client:
        for name in (older, LEDGER.name):
            assert client.execute_command("FCALL", f"{name}_call", 1, P, "cancel", 1000, 60, "nobody") is None
    assert functions.load_all(redis_of(ledger)) == sorted(functions.Library.known)
    assert functions.others(redis_of(ledger)) == [older]
    functions.load_all(redis_of(ledger), only=True)
    assert _libraries(redis_of(ledger)) == set(functions.Library.known)


def test_whoever_may_do_everything_loads_them_by_himself(own_server: Server, ledger: Ledger) -> None:
    redis_of(ledger).execute_command("FUNCTION", "FLUSH")
    assert ledger.submit((f"t{n}", TaskSpec(prompt="hi")) for n in range(300)) == [f"t{n}" for n in range(300)]
    functions.load_all(redis_of(ledger))
