"""compose/users.acl: every role may do its work and nothing else, and what it may not do leaves no trace.

That it may do its work is shown wherever a `Cluster` runs; see test_celery_end_to_end for the rights nobody missed.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from support import users
from support.cluster import Cluster
from support.make import node_info, output, receipt, why
from support.ports import free_port
from support.raw import prefix_of, redis_of
from support.servers import Server
from support.wait import eventually

from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Dispatch, End, Ledger
from perllm.broker.messages import Counters, Delta, Heartbeat, TaskSpec
from perllm.broker.queues.app import node_message
from perllm.broker.settings import Settings

BEAT = Heartbeat(at=0, node="n", boot="boot-1", counters=Counters(), progress={"running": 3})
OPERATIONS: dict[str, Callable[[Ledger], object]] = {
    "submit": lambda x: x.submit([("new", TaskSpec(prompt="hi", idempotency_key="k"))]),
    "cancel": lambda x: x.cancel("pending"),
    "expire": lambda x: x.expire(),
    "revoke": lambda x: x.revoke(["pending", "nobody"]),
    "refuse": lambda x: x.refuse("nobody", "refused", "nonsense"),
    "follow": lambda x: x.follow(10, 60),
    "followed": lambda x: x.followed(["succeeded"]),
    "forget": lambda x: x.forget("running"),
    "lead": lambda x: x.lead("me", 60),
    "resign": lambda x: x.resign("test"),
    "dispatch": lambda x: x.dispatch(1, [_dispatch("pending", 1)]),
    "end": lambda x: x.end(1, [End("pending", "rejected", why("reject"))]),
    "sweep": lambda x: x.sweep(),
    "announce": lambda x: x.announce(),
    "snapshot": lambda x: x.save_snapshot(1, {"learned": 1}),
    "take_back": lambda x: x.take_back(1, [("dispatched", 1)], "not taken up"),
    "distrust": lambda x: x.distrust(1, "n", "boot-1", "it takes up nothing"),
    "register": lambda x: x.register(node_info("m")),
    "beat": lambda x: x.beat(BEAT, [("running", 1, "token")]),
    "claim": lambda x: x.claim("dispatched", 1, "n", "token"),
    "say": lambda x: x.say("running", 1, "token", [Delta(text="some text")]),
    "complete": lambda x: x.complete("running", 1, "token", "succeeded", output(), receipt("n")),
    "fail": lambda x: x.fail("running", 1, "token", "broke", retry=True),
    "hand_back": lambda x: x.hand_back("running", 1, "token", "stopping"),
    "drain": lambda x: x.drain("n", "boot-1", "stopping"),
    "leave": lambda x: x.leave("n", "boot-1", "stopped"),
}
MAY = {
    "producer": {"submit", "cancel", "expire"},
    "api": {"submit", "cancel", "expire", "forget"},
    "webhooks": set[str](),
    "inbox": {"submit", "cancel", "expire", "revoke", "refuse", "follow", "followed"},
    "scheduler": {"lead", "resign", "dispatch", "end", "sweep", "announce", "snapshot"} | {"take_back", "distrust"},
    "worker": {"register", "beat", "claim", "say", "complete", "fail", "hand_back", "drain", "leave", "revoke"}
    | {"sweep"},
    "monitor": set[str](),
}


def _dispatch(task_id: str, attempt: int) -> Dispatch:
    return Dispatch(
        task_id, attempt, "n", "boot-1", "emulated", "edge.n", node_message(task_id, attempt, "edge.n"), why()
    )


@pytest.fixture(scope="module")
def ledgers(own_server: Server) -> Iterator[dict[str, Ledger]]:
    """One per role, and the tests' own under ""."""
    limits = {"lease": 300, "heartbeat": 60}
    urls = {role: users.url_of(role, own_server.url) for role in users.ROLES} | {"": own_server.url}
    made = {role: Ledger(Settings.model_validate({"redis_url": url} | limits)) for role, url in urls.items()}
    yield made
    for ledger in made.values():
        ledger.close()


@pytest.fixture
def all_states(ledgers: dict[str, Ledger]) -> Ledger:
    """The tests' own ledger: a task in every state but the final ones, and a leader that is about to change."""
    ledger = ledgers[""]
    redis_of(ledger).flushall()
    for state in ("pending", "dispatched", "running", "gone"):
        ledger.submit_from_celery(state, TaskSpec(prompt="hi"), followers="{}", progress=True)
    ledger.register(node_info("n"))
    epoch = ledger.lead("test", 60) or 0
    ledger.dispatch(epoch, [_dispatch("dispatched", 1), _dispatch("running", 1)])
    ledger.claim("running", 1, "n", "token")
    ledger.forget("gone")  # and its node and producer are not told yet
    redis_of(ledger).delete(f"{prefix_of(ledger)}leader")
    return ledger


def contents(client: redis.Redis) -> dict[bytes, Any]:
    """Everything on the server."""
    return {key: client.dump(key) for key in client.scan_iter(count=1000)}


def test_every_operation_is_listed() -> None:
    script = (Path(__file__).parents[2] / "broker" / "ledger" / "ledger.lua").read_text()
    assert set(re.findall(r"^(?:function ops\.|ops\[')(\w+)", script, re.MULTILINE)) == set(OPERATIONS)


@pytest.mark.parametrize("role", users.ROLES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_carried_out_or_refused_whole(
    operation: str, role: str, all_states: Ledger, ledgers: dict[str, Ledger]
) -> None:
    if operation in MAY[role]:
        OPERATIONS[operation](ledgers[role])
        return
    before = contents(redis_of(all_states))
    with pytest.raises(Unreachable, match="the user in PERLLM_REDIS_URL may not do this"):
        OPERATIONS[operation](ledgers[role])
    assert contents(redis_of(all_states)) == before


EVERYBODY = [
    "FLUSHALL", "FLUSHDB", "KEYS *", "CONFIG GET maxmemory", "CONFIG SET maxmemory 1", "SHUTDOWN", "MONITOR",
    "EVAL x 0", "EVAL_RO x 0", "EVALSHA x 0", "SCRIPT LOAD x", "SCRIPT KILL", "FUNCTION LOAD x", "FUNCTION LIST",
    "FUNCTION DELETE x", "FUNCTION KILL", "ACL LIST", "ACL SETUSER me on", "CLIENT LIST", "SCRIPT FLUSH",
    "FUNCTION FLUSH", "SAVE",
    "REPLICAOF 127.0.0.1 1",
    "SWAPDB 0 1", "GET outside", "SET outside x", "SET {other}:task:t x", "HGET {other}:task:t payload",
    "PUBLISH outside x", "SET {perllm}:may:sweep x", "SET {perllm}:may:submit x", "CLIENT KILL ADDR 127.0.0.1:1",
    "HGET {perllm}:secrets x",
]  # fmt: skip
ONE = {
    "producer": ["DEL {perllm}:task:running", "GET {perllm}:snapshot", "SET {perllm}:leader me", "INCR {perllm}:epoch",
                 "LPUSH edge.n x", "BRPOP inbox 1", "LPOP inbox", "UNLINK {perllm}:in:pending", "RENAME inbox inbox2",
                 "XTRIM {perllm}:events MAXLEN 0", "PUBLISH {perllm}:signal:n x", "GET {perllm}:api:key:x",
                 "PUBLISH celery-task-meta-running x", "SET celery-task-meta-running x", "PUBLISH /0.celeryev/x x",
                 "HSET {perllm}:followers running x", "ZADD {perllm}:to_follow 0 running", "LPUSH celery x"],
    "api": ["GET {perllm}:snapshot", "SET {perllm}:leader me", "LPUSH edge.n x", "BRPOP inbox 1",
            "PUBLISH /0.celery.pidbox x"],
    "webhooks": ["GET {perllm}:api:key:x", "GET {perllm}:api:file:x", "HGET {perllm}:task:running payload",
                 "LPUSH inbox x", "BRPOP inbox 1", "GET {perllm}:snapshot", "PUBLISH {perllm}:signal:n x"],
    "inbox": ["GET {perllm}:snapshot", "SET {perllm}:leader me", "LPUSH edge.n x", "GET {perllm}:api:key:x"],
    "scheduler": ["BRPOP inbox 1", "PUBLISH /0.celery.pidbox x", "GET {perllm}:api:key:x", "LPUSH inbox x"],
    "worker": ["BRPOP inbox 1", "LPUSH inbox x", "GET {perllm}:snapshot", "SET {perllm}:leader me",
               "INCR {perllm}:epoch", "GET {perllm}:api:key:x"],
    "monitor": ["HSET {perllm}:task:running state succeeded", "ZADD {perllm}:in:succeeded 1 running", "BRPOP inbox 1",
                "DEL {perllm}:events", "GET {perllm}:snapshot", "LPUSH inbox x", "LPUSH edge.n x",
                "GET {perllm}:api:key:x", "GET {perllm}:key:default"],
}  # fmt: skip


@pytest.mark.parametrize(("role", "command"), [(r, c) for r in users.ROLES for c in EVERYBODY + ONE[r]])
def test_a_command_that_is_no_part_of_the_role_is_refused(
    role: str, command: str, all_states: Ledger, ledgers: dict[str, Ledger]
) -> None:
    before = contents(redis_of(all_states))
    with pytest.raises(redis.exceptions.NoPermissionError):
        redis_of(ledgers[role]).execute_command(*command.split())
    assert contents(redis_of(all_states)) == before


def test_without_a_name_nobody_gets_in(tmp_path: Path) -> None:
    """As the file has it; the servers of these tests keep their `default`."""
    lines = users.FILE.read_text().splitlines()
    assert "user default off" in lines
    passwords = [re.findall(r">(\S+)", line) for line in lines if line.startswith("user ") and "default" not in line]
    assert passwords == [[f"${role.upper()}_PASSWORD"] for role in ("admin", *users.ROLES)]


def test_flower_sees_workers_and_tasks_as_the_monitor(own_server: Server, tmp_path: Path) -> None:
    def page(path: str) -> str:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            text: str = answer.read().decode()
            return text
        return ""

    with Cluster(own_server.url, tmp_path) as cluster:
        redis_of(cluster.ledger).flushall()
        port = free_port()
        listen = ["--address=127.0.0.1", f"--port={port}"]
        flower = cluster.start("flower", "perllm.broker.local.flower", *listen, redis_url=cluster.url_of("monitor"))
        cluster.watch(flower, redis_of(cluster.ledger).pubsub_numpat, "listens to events")
        cluster.start_inbox()
        cluster.scheduler()
        cluster.start_nodes("a", slots=1, context=100_000, emulated_speed=100)
        users.denied(own_server.url)
        (task_id,) = cluster.submit()
        assert cluster.result(task_id).state == "succeeded"
        cluster.watch(flower, lambda: "SUCCESS" in page(f"/task/{task_id}"), "shows the task")
        assert "a@test" in page("/workers")
        assert all(queue in page("/broker") for queue in ("edge.a", "inbox", "pending (ledger)"))
        # Cancelled by another door than Celery's: a producer's task that runs, and one that has come and waits.
        endless = {"prompt": "hi", "max_tokens": 90_000, "deadline": 600}
        producer = cluster.producer()
        sent = [producer.send_task("perllm.generate", kwargs=endless, queue="inbox").id for _ in range(6)]
        eventually(lambda: all(cluster.ledger.known(sent)), "all are handed in")
        eventually(lambda: any(cluster.in_state(i, "running") for i in sent), "one runs")
        cluster.ledger.cancel_many(sent)
        for task in sent:
            cluster.watch(flower, lambda: "REVOKED" in page(f"/task/{task}"), "shows it revoked")  # noqa: B023
        assert users.denied(own_server.url) == []
