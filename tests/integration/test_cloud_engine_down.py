"""A node whose engine dies under its tasks: they go back before anything new can come, and who was inside is marked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.make import node_info, why
from support.raw import redis_of
from support.wait import eventually

from perllm.broker.engine.contract import EngineDown, Generation, OnDelta, Stop
from perllm.broker.engine.emulated import EmulatedEngine
from perllm.broker.errors import TaskFailed
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Counters, Returned, TaskSpec, new_id
from perllm.broker.queues.app import node_message
from perllm.broker.worker.node import NodeWorker
from perllm.broker.worker.settings import WorkerSettings


class MortalEngine(EmulatedEngine):
    """Every request waits inside for its death; while it is dead it takes none."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        self.dead = False
        self.inside = 0

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        if self.dead:
            raise EngineDown("the engine died", inside=False)
        self.inside += 1
        eventually(lambda: self.dead, "it dies")
        raise EngineDown("the engine died", inside=True)

    def counters(self) -> Counters:
        if self.dead:
            raise EngineDown("the engine died", inside=False)
        return super().counters()


class Stage:
    def __init__(self, url: str) -> None:
        self.settings = WorkerSettings.model_validate({"redis_url": url, "lease": 60, "heartbeat": 0.05})
        self.ledger = Ledger(self.settings)
        redis_of(self.ledger).flushall()
        self.epoch = self.ledger.lead("test", 60) or 0
        self.engine = MortalEngine(self.settings)
        self.node = NodeWorker(self.settings, Ledger(self.settings), self.engine, node_info("n", slots=8))
        self.node.start()

    def place(self) -> str:
        spec = TaskSpec.model_validate({"prompt": "hi", "max_tokens": 2, "deadline": 600})
        (task_id,) = self.ledger.submit([(new_id(), spec)])
        message = node_message(task_id, 1, "edge.n")
        sent = Dispatch(task_id, 1, "n", "boot-1", "emulated", "edge.n", message, why())
        assert self.ledger.dispatch(self.epoch, [sent]) == ["ok"]
        return task_id

    def draining(self) -> bool:
        return self.ledger.nodes()[0][2]

    def returns(self) -> dict[str, Returned]:
        events = [event for _, event in self.ledger.events("0")]
        found = [event for event in events if isinstance(event, Returned)]
        assert len({event.id for event in found}) == len(found), "each came back once"
        return {event.id: event for event in found}


@pytest.fixture
def stage(valkey: EmbeddedServer) -> Iterator[Stage]:
    one = Stage(valkey.url)
    yield one
    one.node.close()
    one.ledger.close()


def test_tasks_inside_get_a_strike_and_others_do_not(stage: Stage) -> None:
    inside, claimed_later, unclaimed = stage.place(), stage.place(), stage.place()
    with ThreadPoolExecutor() as pool:
        run = pool.submit(stage.node.run, inside, 1)
        eventually(lambda: stage.engine.inside, "it is inside")
        stage.engine.dead = True
        with pytest.raises(TaskFailed, match="the engine died"):
            run.result()
    assert "void" in stage.node.run(claimed_later, 1)  # taken back before it could be claimed
    assert {t: (e.cause, e.strikes) for t, e in stage.returns().items()} == {
        inside: ("failed", 1),
        claimed_later: ("handed_back", 0),
        unclaimed: ("handed_back", 0),
    }


def test_nothing_comes_while_it_is_down_and_the_node_returns_by_itself(stage: Stage) -> None:
    task_id = stage.place()
    stage.engine.dead = True
    assert "handed back" in stage.node.run(task_id, 1) or "void" in stage.node.run(task_id, 1)
    assert stage.draining()
    late = TaskSpec.model_validate({"prompt": "hi", "deadline": 600})
    (late_id,) = stage.ledger.submit([(new_id(), late)])
    sent = Dispatch(late_id, 1, "n", "boot-1", "emulated", "edge.n", node_message(late_id, 1, "edge.n"), why())
    assert stage.ledger.dispatch(stage.epoch, [sent]) == ["node_gone"]
    stage.engine.dead = False
    eventually(lambda: not stage.draining(), "the node is back")
    assert stage.ledger.dispatch(stage.epoch, [sent]) == ["ok"]
    assert stage.returns()[task_id].strikes == 0
