"""Nodes, inbox and scheduler as processes: how they start badly, stop well, and are killed."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import users
from support.cluster import Cluster, Process
from support.ports import free_port
from support.raw import redis_of
from support.wait import eventually

from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Completed, Returned

ENDLESS = 90_000  # tokens, at 100 a second
NODE, INBOX, SCHEDULER = "edge_worker", "broker", "scheduler"


# --- bad starts


BAD_STARTS: dict[str, tuple[str, dict[str, object], str]] = {
    f"{part}: {what}": (part, settings, says)
    for part in (NODE, INBOX, SCHEDULER)
    for what, settings, says in (
        ("a wrong setting", {"lease": "soon"}, "PERLLM_LEASE: "),
        ("a wrong password", {"redis_url": "redis://:wr0ng@127.0.0.1:{port}"}, "refused the login"),
        ("no server", {"redis_url": "redis://127.0.0.1:{free}"}, "no Redis server answers at redis://127.0.0.1:"),
        ("an option of the URL", {"redis_url": "redis://127.0.0.1:{port}?colour=blue"}, "PERLLM_REDIS_URL: "),
    )
} | {
    "node: a name": (NODE, {"node_name": "a b"}, "PERLLM_NODE_NAME: "),
    "node: a model's name": (NODE, {"model_name": "_x y"}, "this node cannot be registered: name: "),
    "scheduler: a policy": (SCHEDULER, {"policy": "guess"}, "there is no 'guess'; choose one of "),
}


@pytest.fixture(scope="module")
def bad_starts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """All of them at once."""
    port, free = free_port(), free_port()
    with (
        EmbeddedServer(tmp_path_factory.mktemp("server"), port) as server,
        Cluster(server.url, tmp_path_factory.mktemp("cluster"), node_name="n") as cluster,
    ):
        started = {}
        for n, (name, (part, settings, _)) in enumerate(BAD_STARTS.items()):
            filled = {k: str(v).format(port=port, free=free) for k, v in settings.items()}
            if part == SCHEDULER:
                started[name] = cluster.start_scheduler(f"{part}-{n}", **filled)
            else:
                started[name] = cluster.start_worker(part, f"{part}-{n}", **filled)
        yield started


@pytest.mark.parametrize("name", BAD_STARTS)
def test_a_bad_start_is_one_line_and_status_2(bad_starts: dict[str, Process], name: str) -> None:
    process = bad_starts[name]
    assert process.wait() == 2, process.output
    (line,) = process.output.splitlines()
    assert line.startswith("error: ")
    assert BAD_STARTS[name][2] in line
    assert "wr0ng" not in line


def test_a_node_whose_name_is_taken(valkey: EmbeddedServer, tmp_path: Path) -> None:
    with Cluster(valkey.url, tmp_path, lease=2) as cluster:
        redis_of(cluster.ledger).flushall()
        (first,) = cluster.start_nodes("a")
        second = cluster.start_worker("edge_worker", "namesake", node_name="a")
        assert second.wait() == 2, second.output
        error = "error: a node named 'a' is already in service: set another PERLLM_NODE_NAME"
        assert error in second.output.splitlines()
        assert "Traceback" not in second.output
        assert first.running


# --- stopping and killing


@pytest.fixture
def cluster(valkey: EmbeddedServer, tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler, and nodes with one slot once they are started."""
    with Cluster(valkey.url, tmp_path, slots=1, emulated_speed=100, context=100_000) as one:
        redis_of(one.ledger).flushall()
        one.scheduler()
        yield one


def test_sigterm_hands_back_what_waits_at_once_and_what_runs_after_the_grace(cluster: Cluster) -> None:
    (node,) = cluster.start_nodes("a")
    ids = cluster.submit(3, max_tokens=ENDLESS)
    (runs,) = eventually(lambda: [i for i in ids if cluster.in_state(i, "running")], "one runs")
    eventually(lambda: sum(cluster.in_state(i, "dispatched") for i in ids) == 2, "two wait on the node")
    node.signal(signal.SIGTERM)
    eventually(lambda: sum(cluster.in_state(i, "pending") for i in ids) >= 2, "what waited is handed back")
    assert node.wait() == 0
    assert cluster.ledger.nodes() == []
    assert {(cluster.task(i).state, cluster.task(i).strikes) for i in ids} == {("pending", 0)}
    returned = [e for _, e in cluster.ledger.events("0-0") if isinstance(e, Returned)]
    assert [e.id for e in returned][-1] == runs  # running work last, after the grace
    assert {e.cause for e in returned} == {"handed_back"}
    assert redis_of(cluster.ledger).llen("edge.a") == 0
    assert "Traceback" not in node.output


def test_sigterm_lets_running_work_finish_within_the_grace(cluster: Cluster) -> None:
    (node,) = cluster.start_nodes("a", grace=60)
    (task_id,) = cluster.submit(max_tokens=100)  # a second
    cluster.await_state(task_id, "running")
    assert node.stop() == 0
    assert cluster.result(task_id).state == "succeeded"


def test_a_killed_nodes_work_is_done_elsewhere(cluster: Cluster) -> None:
    killed, _ = cluster.start_nodes("a", "b")
    ids = cluster.submit(6, max_tokens=50)

    def on_killed(state: str) -> list[str]:
        return [i for i in ids if cluster.task(i).node == "a" and cluster.in_state(i, state)]

    (running,) = eventually(lambda: on_killed("running"), "one runs on the node")
    killed.kill()
    results = {i: cluster.result(i) for i in ids}
    assert {r.state for r in results.values()} == {"succeeded"}
    redone = results[running].receipt
    assert redone is not None
    assert redone.node == "b"
    assert redone.attempt >= 2
    assert cluster.task(running).strikes >= 1
    completed = Counter(e.id for _, e in cluster.ledger.events("0-0") if isinstance(e, Completed))
    assert completed == dict.fromkeys(ids, 1)
    assert redis_of(cluster.ledger).exists("edge.a") == 0


def test_a_frozen_nodes_late_result_changes_nothing(cluster: Cluster) -> None:
    frozen, _ = cluster.start_nodes("a", "b")
    other, task_id = cluster.submit(2, max_tokens=300)
    eventually(lambda: all(cluster.in_state(i, "running") for i in (other, task_id)), "both run")
    if cluster.task(task_id).node != "a":
        task_id = other
    frozen.signal(signal.SIGSTOP)
    result = cluster.result(task_id)
    assert result.receipt is not None
    assert result.receipt.node == "b"
    frozen.signal(signal.SIGCONT)
    cluster.await_node(frozen)  # it was given up, and is back
    (later,) = cluster.submit(max_tokens=1)
    assert cluster.result(later).state == "succeeded"
    assert cluster.result(task_id) == result
    completed = Counter(e.id for _, e in cluster.ledger.events("0-0") if isinstance(e, Completed))
    assert completed[task_id] == 1


def test_everybody_comes_back_to_a_server_that_was_killed(tmp_path: Path) -> None:
    """The server ends as in a power cut and starts again on what it had written."""
    server = EmbeddedServer(tmp_path / "server", users=users.rules())
    server.start()
    with Cluster(server.url, tmp_path, slots=1, emulated_speed=100, context=100_000) as cluster:
        inbox = cluster.start_inbox()
        scheduler = cluster.scheduler()
        node = cluster.start_nodes("a")[0]
        boot = cluster.await_node(node).boot
        ids = cluster.submit(3, max_tokens=70)
        eventually(lambda: any(cluster.in_state(i, "running") for i in ids), "one runs")
        server.kill()
        server.start()
        results = [cluster.result(i) for i in ids]
        assert {r.state for r in results} == {"succeeded"}
        assert cluster.await_node(node).boot == boot
        assert all(p.running for p in (inbox, scheduler, node))
        sent = cluster.producer().send_task("perllm.generate", kwargs={"prompt": "hi", "max_tokens": 1}, queue="inbox")
        assert sent.get(timeout=60)["state"] == "succeeded"
        cluster.stop()
        assert "Traceback" not in scheduler.output
    server.stop()
