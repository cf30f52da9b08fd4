"""The scheduler service on a real server: what it takes over, who leads, and what it does not trip over.

Most of it runs in threads of the test, with the test playing the workers; what is about processes runs as processes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from support.cluster import Cluster
from support.make import node_info, output, receipt, why
from support.raw import prefix_of, redis_of
from support.wait import eventually

from perllm.broker.ledger import Dispatch, Leader, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Completed, Counters, Dispatched, Heartbeat, State, TaskSpec, new_id
from perllm.broker.queues.app import node_message
from perllm.scheduler import service as service_module
from perllm.scheduler.core import pace
from perllm.scheduler.core.scheduler import Decision, SchedulerCore
from perllm.scheduler.policies import describe_policy, make_policy
from perllm.scheduler.service import Service, _LeaderLease, _LeaderSession, _NotLeader
from perllm.scheduler.settings import SchedulerSettings


class Scheduler:
    """A service in a thread of its own, until `stop`."""

    def __init__(self, settings: SchedulerSettings) -> None:
        self.ledger = Ledger(settings)
        self.cores: list[SchedulerCore] = []
        self._service = Service(settings, self.ledger, self._make_core)
        self._thread = threading.Thread(target=self._service.run)
        self._thread.start()

    def _make_core(self) -> SchedulerCore:
        self.cores.append(SchedulerCore(make_policy("least-loaded")))
        return self.cores[-1]

    def stop(self) -> None:
        self._service.stop()
        self._thread.join()
        self.ledger.close()


class Stage:
    """A server, a scheduler on it, and the test as everything else."""

    def __init__(self, url: str, **settings: object) -> None:
        # Leases outlast the test; leadership and snapshots are as brisk as they may be.
        brisk = {"lease": 300, "heartbeat": 60, "leader_ttl": 0.5, "snapshot_every": 0.1}
        self.settings = SchedulerSettings.model_validate(brisk | {"redis_url": url} | settings)
        self.ledger = Ledger(self.settings)
        redis_of(self.ledger).flushall()
        self.schedulers: list[Scheduler] = []

    def start(self) -> Scheduler:
        self.schedulers.append(Scheduler(self.settings))
        return self.schedulers[-1]

    def stop(self) -> None:
        """Stop the one started first."""
        self.schedulers.pop(0).stop()

    def restart(self) -> Scheduler:
        self.stop()
        return self.start()

    def submit(self, count: int = 1, **fields: object) -> list[str]:
        spec = TaskSpec.model_validate({"prompt": "hi", "deadline": 600} | fields)
        return self.ledger.submit([(new_id(), spec) for _ in range(count)])

    def placed(self, task_id: str) -> tuple[str, int]:
        """Node and attempt, once the task is placed."""

        def look() -> tuple[str, int] | None:
            record = self.ledger.task(task_id)
            assert record is not None
            return (record.node or "", record.attempt) if record.state == "dispatched" else None

        return eventually(look, f"task {task_id} is placed")

    def complete(self, task_id: str) -> None:
        """Be the worker of wherever it is."""
        node, attempt = self.placed(task_id)
        assert self.ledger.claim(task_id, attempt, node, "token") is not None
        verdict = self.ledger.complete(task_id, attempt, "token", "succeeded", output(), receipt(node, attempt))
        assert verdict == "ok"

    def work_off(self, task_ids: list[str]) -> None:
        """Be the worker of all of these, wherever they are placed."""
        left = set(task_ids)

        def work() -> bool:
            for task_id in self.ledger.ids(State.DISPATCHED):
                self.complete(task_id)
                left.discard(task_id)
            return not left

        eventually(work, "all are placed")

    def caught_up(self) -> None:
        """Wait until a snapshot stands for everything that has happened."""

        def look() -> bool:
            saved, (_, newest) = self.ledger.load_snapshot(), self.ledger.first_and_last_event()
            return saved is not None and saved["position"] == newest

        eventually(look, "the snapshot is up to date")

    def close(self) -> None:
        while self.schedulers:
            self.stop()
        self.ledger.close()


def placed_count(stage: Stage) -> int:
    return stage.ledger.counts()[State.DISPATCHED]


def state(stage: Stage, task_id: str) -> str:
    record = stage.ledger.task(task_id)
    assert record is not None
    return record.state


@pytest.fixture
def stage(valkey: EmbeddedServer) -> Iterator[Stage]:
    one = Stage(valkey.url)
    yield one
    one.close()


def test_work_waits_for_a_node_and_nodes_share_it(stage: Stage) -> None:
    stage.start()
    ids = stage.submit(4)
    for name in ("a", "b"):
        stage.ledger.register(node_info(name))
    assert Counter(stage.placed(i)[0] for i in ids) == {"a": 2, "b": 2}
    for task_id in ids:
        stage.complete(task_id)
    assert stage.ledger.totals() == {"submitted": 4, "succeeded": 4}


def test_a_node_holds_its_slots_and_a_little_more(stage: Stage) -> None:
    stage.start()
    stage.ledger.register(node_info("a", slots=2))
    ids = stage.submit(10)
    most = 2 + stage.settings.queue_beyond_slots
    eventually(lambda: placed_count(stage) == most, "the node is full")
    done = [i for i in ids if state(stage, i) == "dispatched"]
    stage.complete(done[0])
    eventually(lambda: sum(state(stage, i) == "dispatched" for i in ids) == most, "the place is taken again")


def test_a_draining_node_gets_nothing_more(stage: Stage) -> None:
    stage.start()
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()
    assert stage.placed(task_id) == ("a", 1)
    stage.ledger.drain("a", "boot-1", "stopping")
    stage.ledger.register(node_info("b"))
    assert stage.placed(task_id) == ("b", 2)


def test_what_a_node_does_not_take_up_goes_elsewhere_and_the_node_is_distrusted(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It beats all the same. Also by the next leader, until it takes up what it is sent."""
    for patience in ("FIRST_PATIENCE", "LEAST_PATIENCE"):
        monkeypatch.setattr(pace, patience, 0.1)
    stage.start()
    stage.ledger.register(node_info("hole"))
    ids = stage.submit(3)
    assert [stage.placed(i) for i in ids] == [("hole", 1)] * 3
    stage.ledger.register(node_info("good"))
    alive = Heartbeat(at=0, node="hole", boot="boot-1", counters=Counters())

    def elsewhere() -> bool:
        stage.ledger.beat(alive, [])
        return all(stage.placed(i) == ("good", 2) for i in ids)

    eventually(elsewhere, "they are placed anew")
    assert "took up none of 3" in eventually(lambda: stage.ledger.distrusted(["hole", "good"]), "it is noted")["hole"]
    record = stage.ledger.task(ids[0])
    assert record is not None
    assert record.why is not None
    assert [(c.node, c.feasible) for c in record.why.candidates] == [("good", True), ("hole", False)]
    assert "took up none of 3" in record.why.candidates[1].note
    cores = stage.restart().cores

    def known() -> bool:
        hole = cores[-1].cluster.nodes.get("hole") if cores else None
        return hole is not None and "took up none" in hole.pace.distrust

    eventually(known, "the next leader knows it")
    (probe,) = stage.submit()
    assert stage.placed(probe) == ("hole", 1)
    stage.complete(probe)
    eventually(lambda: not stage.ledger.distrusted(["hole"]), "it is trusted again")


def test_a_restarted_node_is_sent_work_under_its_new_name_tag(stage: Stage) -> None:
    """Between its death and the scheduler's reading of it, a dispatch names the old boot and is refused."""
    stage.start()
    stage.ledger.register(node_info("a"))
    (first,) = stage.submit()
    stage.placed(first)
    redis_of(stage.ledger).zadd(f"{prefix_of(stage.ledger)}nodes", {"a": stage.ledger.now() - 1})  # moves time
    stage.ledger.register(node_info("a", boot="boot-2"))
    for task_id in (first, *stage.submit(1)):
        assert stage.placed(task_id)[0] == "a"
        stage.complete(task_id)


TEST_LEADER = Leader("test", 0.0, "least-loaded", "")


class Raced(SchedulerCore):
    """A core whose decisions come too late: something else happens between them and the ledger's ruling."""

    def __init__(self) -> None:
        super().__init__(make_policy("least-loaded"))
        self.meanwhile: list[Callable[[], object]] = []

    def decide(self, now: float) -> list[Decision]:
        decisions = super().decide(now)
        if decisions and self.meanwhile:
            self.meanwhile.pop()()
        return decisions


@pytest.fixture
def raced(stage: Stage) -> tuple[Raced, _LeaderSession]:
    core, lease = Raced(), _LeaderLease(stage.ledger, TEST_LEADER, 60)
    assert lease.acquire()
    session = _LeaderSession(stage.ledger, core, lease)
    session.take_over()
    return core, session


def test_a_task_that_somebody_else_placed_meanwhile(stage: Stage, raced: tuple[Raced, _LeaderSession]) -> None:
    """As when a reply was lost and the call repeated: the ledger refuses, the stream tells where the task is."""
    core, session = raced
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()
    message = node_message(task_id, 1, "edge.a")
    first = Dispatch(task_id, 1, "a", "boot-1", "emulated", "edge.a", message, why())
    core.meanwhile.append(lambda: stage.ledger.dispatch(1, [first]))
    session.step(block=0.01)
    assert core.find(task_id) is None
    session.step(block=0.01)
    task = core.find(task_id)
    assert task is not None
    assert (task.node, task.attempt) == ("a", 1)
    assert set(core.cluster.nodes["a"].in_flight) == {task_id}


def test_a_task_that_was_cancelled_meanwhile(stage: Stage, raced: tuple[Raced, _LeaderSession]) -> None:
    core, session = raced
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()
    core.meanwhile.append(lambda: stage.ledger.cancel(task_id))
    for _ in range(2):
        session.step(block=0.01)
    assert core.find(task_id) is None
    assert core.cluster.nodes["a"].in_flight == {}


@pytest.mark.parametrize("how", ["drained", "restarted"])
def test_a_node_that_went_meanwhile(stage: Stage, raced: tuple[Raced, _LeaderSession], how: str) -> None:
    core, session = raced
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()

    def goes() -> None:
        stage.ledger.leave("a", "boot-1", "stopped")
        if how == "restarted":
            stage.ledger.register(node_info("a", boot="boot-2"))

    core.meanwhile.append(goes)
    session.step(block=0.01)
    task = core.find(task_id)
    assert task is not None
    assert (task.node, task.attempt) == (None, 0)
    if how == "drained":
        stage.ledger.register(node_info("a", boot="boot-2"))
    session.step(block=0.01)
    assert stage.placed(task_id) == ("a", 1)


def test_another_scheduler_leads_meanwhile(stage: Stage, raced: tuple[Raced, _LeaderSession]) -> None:
    core, session = raced
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()

    def another_leads() -> None:
        stage.ledger.resign(TEST_LEADER.dump())
        assert stage.ledger.lead("another", 60) == 2

    core.meanwhile.append(another_leads)
    with pytest.raises(_NotLeader):
        session.step(block=0.01)
    assert state(stage, task_id) == "pending"
    with pytest.raises(_NotLeader):
        session.save()


# --- taking over


def test_a_restart_loses_nothing(stage: Stage) -> None:
    stage.start()
    stage.ledger.register(node_info("a", slots=1))
    ids = stage.submit(8)
    eventually(lambda: placed_count(stage) == 3, "the node is full")
    running = next(i for i in ids if state(stage, i) == "dispatched")
    assert stage.ledger.claim(running, 1, "a", "token") is not None
    second = stage.restart()
    eventually(lambda: second.cores, "the next one leads")
    assert stage.ledger.complete(running, 1, "token", "succeeded", output(), receipt("a")) == "ok"
    stage.work_off([i for i in ids if i != running])
    events = [e for _, e in stage.ledger.events("0-0")]
    assert Counter(e.id for e in events if isinstance(e, Dispatched)) == dict.fromkeys(ids, 1)
    assert Counter(e.id for e in events if isinstance(e, Completed)) == dict.fromkeys(ids, 1)


def test_a_returned_task_is_placed_again_after_a_restart(stage: Stage) -> None:
    """The snapshot stands for its whole history, so what was tried comes from the ledger alone."""
    stage.start()
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()
    stage.placed(task_id)
    stage.ledger.leave("a", "boot-1", "stopped")
    eventually(lambda: state(stage, task_id) == "pending", "it is back")
    stage.caught_up()
    stage.restart()
    stage.ledger.register(node_info("b"))
    assert stage.placed(task_id) == ("b", 2)


def test_places_taken_are_known_after_a_restart(stage: Stage) -> None:
    stage.start()
    stage.ledger.register(node_info("a", slots=1))
    ids = stage.submit(5)
    eventually(lambda: placed_count(stage) == 3, "the node is full")
    stage.caught_up()
    second = stage.restart()
    (core,) = eventually(lambda: second.cores, "the next one leads")
    eventually(lambda: "a" in core.cluster.nodes and len(core.cluster.nodes["a"].in_flight) == 3, "it counts them")
    stage.complete(next(i for i in ids if state(stage, i) == "dispatched"))
    eventually(lambda: placed_count(stage) == 3, "the place is taken again")
    assert len(core.pending) == 1


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_stream_too_short_to_tell(stage: Stage, kept: int) -> None:
    """Everything that matters is in the ledger; the stream only says that something changed."""
    stage.start()
    stage.ledger.register(node_info("a", slots=1))
    ids = stage.submit(6)
    eventually(lambda: placed_count(stage) == 3, "the node is full")
    stage.stop()
    redis_of(stage.ledger).delete(f"{prefix_of(stage.ledger)}snapshot")
    redis_of(stage.ledger).xtrim(f"{prefix_of(stage.ledger)}events", maxlen=kept, approximate=False)
    stage.start()
    stage.work_off(ids)
    assert stage.ledger.totals() == {"submitted": 6, "succeeded": 6}


@pytest.mark.parametrize(
    "snapshot",
    [
        "not JSON",
        "[]",
        "{}",
        '{"core": {"policy": "least-loaded", "state": {}}, "position": "0-0"}',  # of the release before formats
        '{"core": {"format": 1000, "policy": "least-loaded", "state": {}}, "position": "0-0"}',
        '{"core": {"format": 3, "policy": "another", "state": {}}, "position": "0-0"}',
        '{"core": {"format": 3, "policy": "least-loaded", "state": 5}, "position": "0-0"}',
        '{"core": {"format": 3, "policy": "least-loaded", "state": {}}, "position": "yesterday"}',
        '{"core": {"format": 3, "policy": "least-loaded", "state": {}}}',
    ],
)
def test_an_unusable_snapshot_is_passed_over(stage: Stage, snapshot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so, and the scheduler starts anew."""
    redis_of(stage.ledger).set(f"{prefix_of(stage.ledger)}snapshot", snapshot)
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()
    log = Mock()
    monkeypatch.setattr(service_module, "log", log)
    stage.start()
    assert stage.placed(task_id) == ("a", 1)
    said = {call.args[0] for call in log.warning.call_args_list}
    assert said - {"not_leader"} == {"snapshot_unusable"}  # on a busy machine it may lose the lead in between


def test_nonsense_in_the_stream_and_among_the_nodes(stage: Stage) -> None:
    stage.start()
    for entry in ({"e": "not JSON"}, {"e": '{"type":"node_up","at":1,"info":{"name":"x"}}'}, {"x": "y"}):
        redis_of(stage.ledger).xadd(f"{prefix_of(stage.ledger)}events", entry)
    redis_of(stage.ledger).hset(f"{prefix_of(stage.ledger)}node:x", mapping={"info": "not JSON", "boot": "b"})
    redis_of(stage.ledger).zadd(f"{prefix_of(stage.ledger)}nodes", {"x": stage.ledger.now() + 60})
    stage.restart()
    stage.ledger.register(node_info("a"))
    (task_id,) = stage.submit()
    assert stage.placed(task_id) == ("a", 1)


def test_taking_over_longer_than_leadership_lasts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        service_module, "FETCH_TASKS", 1
    )  # a round trip per task, as if there were a thousand times more
    stage.submit(6000)
    redis_of(stage.ledger).delete(f"{prefix_of(stage.ledger)}events")
    stage.start()
    stage.ledger.register(node_info("a"))
    eventually(lambda: placed_count(stage) == 4, "it places work")


# --- who leads


def test_one_leads_and_the_other_follows(stage: Stage) -> None:
    first = stage.start()
    eventually(lambda: first.cores, "the first leads")
    second = stage.start()
    stage.ledger.register(node_info("a"))
    for task_id in stage.submit(4):
        stage.placed(task_id)
    assert not second.cores
    first_holder = redis_of(stage.ledger).get(f"{prefix_of(stage.ledger)}leader")
    stage.stop()
    holder = redis_of(stage.ledger).get(f"{prefix_of(stage.ledger)}leader")
    assert holder != first_holder  # given up, not left to lapse
    eventually(lambda: second.cores, "the second leads")
    (task_id,) = stage.submit()
    stage.ledger.register(node_info("b"))
    assert stage.placed(task_id) == ("b", 1)


def test_everybody_can_know_who_leads_and_by_which_policy(stage: Stage) -> None:
    assert stage.ledger.leader() is None
    before = stage.ledger.now()
    first = stage.start()
    eventually(lambda: first.cores, "it leads")
    leader = stage.ledger.leader()
    assert leader is not None
    assert f":{os.getpid()}:" in leader.holder
    assert before <= leader.since <= stage.ledger.now()
    assert (leader.policy, leader.sentence) == ("cs-ucb", describe_policy("cs-ucb"))
    stage.stop()
    assert stage.ledger.leader() is None
    redis_of(stage.ledger).set(f"{prefix_of(stage.ledger)}leader", "box:1:f00")  # of another release
    assert stage.ledger.leader() == ("box:1:f00", 0.0, "", "")


def test_two_that_both_believe_they_lead_place_every_task_once(stage: Stage) -> None:
    """Both decide about every task at once; the ledger listens only to who leads now."""
    for name in ("a", "b"):
        stage.ledger.register(node_info(name))
    old = stage.ledger.lead("old", 60)
    stage.ledger.resign("old")  # without its knowledge, as when its lease had lapsed
    new = stage.ledger.lead("new", 60)
    assert old is not None
    assert new == old + 1
    ids = stage.submit(200)

    def decide(epoch: int, node: str) -> Counter[str]:
        ledger, rulings = Ledger(stage.settings), Counter[str]()
        for task_id in ids:
            message = node_message(task_id, 1, f"edge.{node}")
            rulings.update(
                ledger.dispatch(
                    epoch, [Dispatch(task_id, 1, node, "boot-1", "emulated", f"edge.{node}", message, why())]
                )
            )
        assert ledger.save_snapshot(epoch, {"by": epoch}) == (epoch == new)
        ledger.close()
        return rulings

    with ThreadPoolExecutor(2) as threads:
        rulings = list(threads.map(decide, (old, new), "ab"))
    assert rulings == [{"not_leader": 200}, {"ok": 200}]
    queues = [redis_of(stage.ledger).llen(f"edge.{node}") for node in "ab"]
    assert queues == [0, 200]
    assert stage.ledger.load_snapshot() == {"by": new}


def test_a_leader_that_was_frozen_finds_that_it_leads_no_more(valkey: EmbeddedServer, tmp_path: Path) -> None:
    with Cluster(valkey.url, tmp_path) as cluster:
        redis_of(cluster.ledger).flushall()
        first = cluster.scheduler("first")
        second = cluster.start_scheduler("second")
        first.signal(signal.SIGSTOP)
        cluster.watch(second, lambda: cluster.leads(second), "leads")
        cluster.ledger.register(node_info("a"))
        first.signal(signal.SIGCONT)
        cluster.watch(first, lambda: "not_leader" in first.output, "notices")
        ids = cluster.submit(4)
        eventually(lambda: all(cluster.in_state(i, "dispatched") for i in ids), "all are placed")
        dispatched = Counter(e.id for _, e in cluster.ledger.events("0-0") if isinstance(e, Dispatched))
        assert dispatched == dict.fromkeys(ids, 1)
        cluster.stop()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_learned_outlives_the_process(valkey: EmbeddedServer, tmp_path: Path, how: signal.Signals) -> None:
    with Cluster(valkey.url, tmp_path, policy="cs-ucb-paper") as cluster:
        redis_of(cluster.ledger).flushall()
        first = cluster.scheduler("first")
        node = cluster.start_nodes("a")[0]
        for task_id in cluster.submit(12):
            assert cluster.result(task_id).state == "succeeded"
        first.signal(how)
        first.wait()
        node.kill()  # no more events
        second = cluster.start_scheduler("second")
        cluster.watch(second, lambda: cluster.leads(second) and learned(cluster)["feedbacks"] == 12, "knows it all")
        before = learned(cluster)
        assert second.stop() == 0
        assert learned(cluster) == before


def learned(cluster: Cluster) -> dict[str, Any]:
    saved = cluster.ledger.load_snapshot()
    assert saved is not None
    state: dict[str, Any] = saved["core"]["state"]
    return state


def test_a_killed_leader_is_followed_by_the_standby(valkey: EmbeddedServer, tmp_path: Path) -> None:
    with Cluster(valkey.url, tmp_path, slots=1, emulated_speed=100, lease=30) as cluster:
        redis_of(cluster.ledger).flushall()
        first = cluster.scheduler("first")
        second = cluster.start_scheduler("second")
        cluster.start_nodes("a", "b")
        ids = cluster.submit(16, max_tokens=20)
        eventually(lambda: cluster.ledger.totals().get("succeeded", 0) >= 2, "some are done")
        first.kill()
        assert {cluster.result(i).state for i in ids} == {"succeeded"}
        assert cluster.leads(second)
        assert {cluster.task(i).attempt for i in ids} == {1}  # nobody's work was done twice


# --- a server that has forgotten


def test_what_was_placed_in_a_second_the_server_has_forgotten_is_placed_again(tmp_path: Path) -> None:
    """The server ends as in a power cut, what it had not synced is lost, and the leader's connection outlives it."""
    server = EmbeddedServer(tmp_path)
    server.start()
    stage = Stage(server.url, leader_ttl=60)
    try:
        ids = stage.submit(3)
        scheduler = stage.start()
        eventually(lambda: scheduler.cores, "it leads")
        (written,) = tmp_path.glob("appendonlydir/*.incr.aof")
        synced = written.stat().st_size
        stage.ledger.register(node_info("a"))
        for task_id in ids:
            stage.placed(task_id)
        server.kill()
        os.truncate(written, synced)
        server.start()
        assert {state(stage, i) for i in ids} == {"pending"}
        stage.ledger.register(node_info("a"))
        for task_id in ids:
            assert stage.placed(task_id) == ("a", 1)
    finally:
        stage.close()
        server.stop()
