"""Workers that die by a task's fault, and workers that are all restarted while there is work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import Cluster, Process
from support.raw import prefix_of, redis_of
from support.replay import POISON, POISON_STATUS
from support.wait import eventually

from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Claimed, State
from perllm.scheduler.service import SWEEP_EVERY
from perllm.scheduler.settings import SchedulerSettings


@pytest.fixture
def cluster(valkey: EmbeddedServer, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(valkey.url, tmp_path, slots=4, grace=30) as one:
        redis_of(one.ledger).flushall()
        one.scheduler()
        yield one


def start_replays(cluster: Cluster, *names: str) -> list[Process]:
    nodes = [cluster.start_worker("support.replay_worker", name, node_name=name) for name in names]
    for node in nodes:
        cluster.await_node(node)
    return nodes


def test_a_task_that_kills_workers_takes_three_and_no_fourth(cluster: Cluster) -> None:
    nodes = start_replays(cluster, "a", "b", "c", "d")
    (poison,) = cluster.submit(prompt=f"hello {POISON}", max_tokens=1)
    record = cluster.await_state(poison, "failed")
    assert (record.strikes, record.attempt) == (3, 3)
    assert "strike 3 of 3" in (cluster.result(poison).reason or "")
    assert cluster.ledger.ids(State.FAILED) == [poison]  # where dead letters are looked for
    dead = [n for n in nodes if not n.running]
    assert [n.wait() for n in dead] == [POISON_STATUS] * 3
    claims = [e.node for _, e in cluster.ledger.events("0-0") if isinstance(e, Claimed) and e.id == poison]
    assert sorted(claims) == sorted(n.name for n in dead)  # each died of it once
    after = cluster.submit(4, max_tokens=1)
    assert {cluster.result(i).state for i in after} == {"succeeded"}


def test_restarting_every_worker_under_load_delays_but_never_fails(cluster: Cluster) -> None:
    nodes = start_replays(cluster, "a", "b", "c")
    ids = []
    for number, node in enumerate(nodes):
        ids += cluster.submit(40, max_tokens=100)  # half a second each
        eventually(lambda node=node: holds_work(cluster, node), "it has work")
        assert node.stop() == 0, node.output
        nodes[number] = start_replays(cluster, node.name)[0]
    assert {cluster.result(i).state for i in ids} == {"succeeded"}
    assert {cluster.task(i).strikes for i in ids} == {0}
    for node in nodes:
        assert holds_work(cluster, node) is False


def holds_work(cluster: Cluster, node: Process) -> bool:
    return bool(redis_of(cluster.ledger).scard(f"{prefix_of(cluster.ledger)}node:{node.name}:tasks"))


def test_what_is_shipped_notices_deaths_within_five_seconds() -> None:
    """A worker's: its lease, and the sweep after it. A leader's: its lock, and the standby's next look."""
    shipped = {name: field.default for name, field in SchedulerSettings.model_fields.items()}
    assert max(shipped["lease"], 2.5 * shipped["heartbeat"]) + SWEEP_EVERY <= 5
    assert shipped["leader_ttl"] * 1.25 <= 5
