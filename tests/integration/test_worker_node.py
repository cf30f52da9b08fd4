"""The worker around its engine, in this process, on a real server: attempts, heartbeats, and the ends of both.

Celery's threads are played by threads of the test; the scheduler by the test itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.make import node_info, why
from support.raw import prefix_of, redis_of
from support.wait import eventually

from perllm.broker.engine.contract import EngineDown, EngineError, Generation, OnDelta, Stop
from perllm.broker.engine.emulated import EmulatedEngine
from perllm.broker.errors import BadSetting, TaskExpired, TaskFailed
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import State, TaskSpec, new_id
from perllm.broker.queues.app import node_message
from perllm.broker.worker import node
from perllm.broker.worker.node import NodeWorker
from perllm.broker.worker.settings import WorkerSettings

ENDLESS = 1_000_000  # tokens


class TestEngine(EmulatedEngine):
    """The emulated engine, which can be told to break."""

    __test__ = False

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        self.fault: Callable[[], Exception | None] = lambda: None
        self.inside: list[str] = []  # tasks in it now; never one twice

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        if fault := self.fault():
            raise fault
        assert task_id not in self.inside
        self.inside.append(task_id)
        try:
            return super().generate(task_id, spec, stop, on_delta)
        finally:
            self.inside.remove(task_id)


class Stage:
    """One node and what the scheduler would do for it."""

    def __init__(self, url: str, **settings: object) -> None:
        slow = {"emulated_speed": 100.0, "context": 2 * ENDLESS}
        # Leases and beats longer than a test: only what the test does makes anything happen.
        calm = {"lease": 300, "heartbeat": 60, "grace": 60}
        self.settings = WorkerSettings.model_validate(calm | slow | {"redis_url": url} | settings)
        self.ledger = Ledger(self.settings)
        redis_of(self.ledger).flushall()
        self.engine = TestEngine(self.settings)
        self.node = NodeWorker(self.settings, Ledger(self.settings), self.engine, node_info("n"))
        self.threads = ThreadPoolExecutor(8)
        self.epoch = self.ledger.lead("test", 60) or 0

    def submit(self, tokens: int = 2, **fields: object) -> str:
        spec = TaskSpec.model_validate({"prompt": "hi", "max_tokens": tokens, "deadline": 60} | fields)
        return self.ledger.submit([(new_id(), spec)])[0]

    def dispatch(self, task_id: str, attempt: int = 1) -> None:
        sent = Dispatch(
            task_id, attempt, "n", "boot-1", "emulated", "edge.n", node_message(task_id, attempt, "edge.n"), why()
        )
        assert self.ledger.dispatch(self.epoch, [sent]) == ["ok"]

    def send(self, task_id: str, attempt: int = 1) -> Future[str]:
        """Dispatch an attempt and run it in a thread."""
        self.dispatch(task_id, attempt)
        return self.threads.submit(self.node.run, task_id, attempt)

    def running(self, task_id: str) -> None:
        """Wait until the engine generates it."""
        eventually(lambda: task_id in self.engine.progress(), "it is generating")

    def lapse(self, task_id: str) -> None:
        """Move the end of a running task's lease into the past, and let the ledger see to it."""
        redis_of(self.ledger).zadd(f"{prefix_of(self.ledger)}in:running", {task_id: self.ledger.now() - 1})
        assert self.ledger.sweep() == 1

    def state(self, task_id: str) -> str:
        record = self.ledger.task(task_id)
        assert record is not None
        return record.state

    def close(self) -> None:
        self.node.close()
        for task_id in self.engine.progress():
            if attempt := self.node._running.get(task_id):
                attempt.stop.cancel()
        self.threads.shutdown()
        self.ledger.close()


@pytest.fixture
def stage(valkey: EmbeddedServer) -> Iterator[Stage]:
    one = Stage(valkey.url)
    one.node.start()
    yield one
    one.close()


def test_a_task_runs_and_its_receipt_says_what_it_took(stage: Stage) -> None:
    task_id = stage.submit(tokens=3, prompt="x" * 1000)
    assert "3 tokens" in stage.send(task_id).result()
    result = stage.ledger.results([task_id])[0]
    assert result is not None
    assert (result.state, result.on_time, result.text) == ("succeeded", True, "word word word")
    receipt = result.receipt
    assert receipt is not None
    assert (receipt.node, receipt.model, receipt.attempt, receipt.completion_tokens) == ("n", "emulated", 1, 3)
    assert receipt.payload_bytes > 1000
    assert receipt.decode >= 0.03
    assert (receipt.energy.method, receipt.energy.estimated) == ("emulated", True)
    assert receipt.after.generated - receipt.before.generated == 3
    assert result.latency >= (result.queued or 0) + receipt.decode


def test_several_answers_are_one_result_with_one_receipt(stage: Stage) -> None:
    task_id = stage.submit(tokens=2, n=3, stream=True, echo=True)
    stage.send(task_id).result()
    (result,) = stage.ledger.results([task_id])
    assert result is not None
    assert result.output is not None
    assert result.receipt is not None
    assert [choice.text for choice in result.output.choices] == ["hiword word"] * 3
    assert (result.receipt.completion_tokens, result.receipt.choice_tokens) == (6, (2, 2, 2))
    said = [delta for _, deltas in stage.ledger.deltas(task_id) for delta in deltas]
    assert all("hiword word".startswith("".join(d.text for d in said if d.index == i)) for i in range(3))


def test_a_task_is_expired_where_the_deadline_cut_any_answer(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first one was whole."""
    real = stage.engine.generate

    def cut(*args: Any) -> Generation:
        done = real(*args)
        more = [choice.model_copy(update={"finish_reason": "deadline"}) for choice in done.output.more]
        return replace(done, output=done.output.model_copy(update={"more": tuple(more)}))

    monkeypatch.setattr(stage.engine, "generate", cut)
    task_id = stage.submit(n=2)
    with pytest.raises(TaskExpired):
        stage.send(task_id).result()
    assert stage.state(task_id) == "expired"


def test_a_void_attempt_does_nothing(stage: Stage) -> None:
    task_id = stage.submit()
    stage.dispatch(task_id)
    stage.ledger.cancel(task_id)
    assert "void" in stage.node.run(task_id, 1)
    assert "void" in stage.node.run("nobody", 1)


def test_a_cancel_is_heard_at_once_not_at_the_next_beat(stage: Stage) -> None:
    task_id = stage.submit(ENDLESS)
    run = stage.send(task_id)
    stage.running(task_id)
    eventually(lambda: redis_of(stage.ledger).pubsub_numsub(f"{prefix_of(stage.ledger)}signal:n")[0][1], "it listens")
    stage.ledger.cancel(task_id)
    stage.ledger.announce()  # as the scheduler does
    assert "stopped after" in run.result(timeout=30)  # half a beat
    assert stage.state(task_id) == "cancelled"


def test_a_deadline_while_it_runs_keeps_the_part_done(stage: Stage) -> None:
    task_id = stage.submit(ENDLESS, deadline=1)
    with pytest.raises(TaskExpired, match="the deadline passed after"):
        stage.send(task_id).result()
    result = stage.ledger.results([task_id])[0]
    assert result is not None
    assert result.receipt is not None
    assert (result.state, result.on_time) == ("expired", False)
    assert 0 < result.receipt.completion_tokens == len(result.text.split()) < ENDLESS
    assert f"after {result.receipt.completion_tokens} tokens" in (result.reason or "")


def test_an_answer_of_any_length_is_as_long_as_its_deadline_allows(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "DELIVERY_SECONDS", 10.0)  # so a fifth of the time left, however busy this machine is
    answer, formed = (
        stage.submit(ENDLESS, deadline=2, fit_context=True, **fields) for fields in ({}, {"grammar": 'root ::= "a"'})
    )
    runs = [stage.send(task_id) for task_id in (answer, formed)]
    runs[0].result()
    with pytest.raises(TaskExpired):  # half of what must have a form is worth nothing
        runs[1].result()
    result = stage.ledger.results([answer])[0]
    assert result is not None
    assert result.output is not None
    assert result.receipt is not None
    assert (result.state, result.on_time, result.output.finish_reason) == ("succeeded", True, "length")
    assert 0 < result.receipt.completion_tokens < ENDLESS
    assert result.receipt.cut


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        (EngineError("the grammar is bad", retry=False), "failed", "the grammar is bad"),
        (EngineError("out of memory", retry=True), "pending", ""),
        (ZeroDivisionError("a bug"), "pending", ""),
    ],
)
def test_an_engine_that_fails(stage: Stage, fault: Exception, state: str, reason: str) -> None:
    task_id = stage.submit()
    stage.engine.fault = lambda: fault
    with pytest.raises(TaskFailed, match=str(fault)):
        stage.send(task_id).result()
    record = stage.ledger.task(task_id)
    assert record is not None
    assert record.state == state
    assert (record.result.reason if record.result else "") == reason
    assert record.strikes == (state == "pending")


def test_a_task_that_always_fails_strikes_out(stage: Stage) -> None:
    task_id = stage.submit()
    stage.engine.fault = lambda: EngineError("no", retry=True)
    for attempt in range(1, stage.settings.max_strikes + 1):
        assert stage.state(task_id) == "pending"
        with pytest.raises(TaskFailed):
            stage.send(task_id, attempt).result()
    assert stage.state(task_id) == "failed"


def test_a_payload_of_another_version_is_not_run(stage: Stage) -> None:
    task_id = stage.submit()
    payload = '{"prompt": "hi", "colour": "blue"}'
    redis_of(stage.ledger).hset(f"{prefix_of(stage.ledger)}task:{task_id}", "payload", payload)
    with pytest.raises(TaskFailed, match="another version"):
        stage.send(task_id).result()


def test_the_next_attempt_waits_for_the_last_one_to_leave_the_engine(stage: Stage) -> None:
    """A worker that was frozen loses its lease, and the only node there is gets the task again."""
    task_id = stage.submit(ENDLESS)
    first = stage.send(task_id, 1)
    stage.running(task_id)
    stage.lapse(task_id)
    second = stage.send(task_id, 2)
    assert "stopped" in first.result(timeout=30)
    stage.running(task_id)
    assert stage.state(task_id) == "running"
    assert stage.ledger.cancel(task_id) is State.RUNNING
    stage.ledger.announce()  # as the scheduler does
    assert "stopped" in second.result(timeout=30)


def test_the_same_message_twice_runs_once(stage: Stage) -> None:
    task_id = stage.submit(ENDLESS)
    first = stage.send(task_id)
    stage.running(task_id)
    assert "void" in stage.node.run(task_id, 1)
    assert not first.done()
    assert stage.state(task_id) == "running"
    stage.ledger.cancel(task_id)
    stage.ledger.announce()  # as the scheduler does
    first.result(timeout=30)


def test_a_graceful_stop_hands_back_what_waits_then_what_runs(valkey: EmbeddedServer) -> None:
    stage = Stage(valkey.url, grace=0.5)
    stage.node.start()
    runs, waits = stage.submit(ENDLESS), stage.submit()
    run = stage.send(runs)
    stage.running(runs)
    stage.dispatch(waits)
    stop = threading.Thread(target=stage.node.drain)
    stop.start()
    assert "handed back" in run.result(timeout=30)
    stop.join()
    returned = [e.id for _, e in stage.ledger.events("0-0") if e.type == "returned"]
    assert returned == [waits, runs]
    for task_id in (runs, waits):
        record = stage.ledger.task(task_id)
        assert record is not None
        assert (record.state, record.strikes) == ("pending", 0)
    stage.close()
    assert stage.ledger.nodes() == []


def test_running_work_may_finish_within_the_grace(stage: Stage) -> None:
    task_id = stage.submit(tokens=50)
    run = stage.send(task_id)
    stage.running(task_id)
    stage.node.drain()
    assert "50 tokens" in run.result()
    assert stage.state(task_id) == "succeeded"


def test_a_stopping_node_that_was_given_up_does_not_come_back_for_more(valkey: EmbeddedServer) -> None:
    stage = Stage(valkey.url, heartbeat=0.1)
    stage.node.start()
    task_id = stage.submit(ENDLESS)
    run = stage.send(task_id)
    stage.running(task_id)
    stop = threading.Thread(target=stage.node.drain)
    stop.start()
    eventually(lambda: stage.ledger.nodes()[0][2], "it drains")
    stage.ledger.leave("n", "boot-1", "as if its registration had lapsed")
    eventually(lambda: any(draining for _, _, draining in stage.ledger.nodes()), "it is back, and draining")
    stage.ledger.cancel(task_id)
    stage.ledger.announce()  # as the scheduler does
    run.result(timeout=30)
    stop.join()
    stage.close()


def test_a_node_that_was_given_up_registers_again(valkey: EmbeddedServer) -> None:
    stage = Stage(valkey.url, heartbeat=0.1)
    stage.node.start()
    stage.ledger.leave("n", "boot-1", "as if its registration had lapsed")
    eventually(stage.ledger.nodes, "it is back")
    assert "2 tokens" in stage.send(stage.submit()).result()
    stage.close()


def test_work_that_lost_its_lease_is_stopped_by_the_next_beat(valkey: EmbeddedServer) -> None:
    stage = Stage(valkey.url, heartbeat=0.1)
    stage.node.start()
    task_id = stage.submit(ENDLESS)
    run = stage.send(task_id)
    stage.running(task_id)
    stage.lapse(task_id)
    assert "stopped" in run.result(timeout=30)
    assert stage.state(task_id) == "pending"
    stage.close()


def test_an_engine_that_died_takes_its_node_out_until_it_is_back(valkey: EmbeddedServer) -> None:
    stage = Stage(valkey.url, heartbeat=0.1)
    stage.node.start()
    up = threading.Event()
    counters = stage.engine.counters

    def counters_when_up() -> object:
        if not up.is_set():
            raise EngineDown("the engine died", inside=False)
        return counters()

    stage.engine.counters = counters_when_up  # type: ignore[method-assign, assignment]
    eventually(lambda: stage.ledger.nodes()[0][2], "out of service")
    up.set()
    eventually(lambda: not stage.ledger.nodes()[0][2], "back in service")
    stage.close()


def test_a_live_namesake_is_refused(valkey: EmbeddedServer) -> None:
    stage = Stage(valkey.url, lease=1.5, heartbeat=0.1)
    stage.node.start()
    namesake = NodeWorker(stage.settings, stage.ledger, stage.engine, node_info("n", boot="boot-2"))
    with pytest.raises(BadSetting, match=r"a node named 'n' is already in service: set another PERLLM_NODE_NAME"):
        namesake.start()
    assert stage.ledger.nodes()[0][0].boot == "boot-1"
    stage.close()


def test_a_dead_namesake_is_waited_for(valkey: EmbeddedServer) -> None:
    stage = Stage(valkey.url, lease=0.5, heartbeat=0.1)
    assert stage.ledger.register(node_info("n", boot="boot-0")) is None
    stage.node.start()
    assert stage.ledger.nodes()[0][0].boot == "boot-1"
    stage.close()


def test_a_result_is_kept_until_the_server_is_back(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    server.start()
    stage = Stage(server.url, heartbeat=0.1)
    stage.node.start()
    task_id = stage.submit(tokens=50)
    run = stage.send(task_id)
    stage.running(task_id)
    with capture_logs() as logs:
        server.kill()
        eventually(lambda: any(x["event"] == "delivery_delayed" for x in logs), "it could not deliver")
    assert not run.done()
    server.start()
    assert run.result(timeout=60).startswith("ok: 50 tokens")
    assert stage.state(task_id) == "succeeded"
    stage.close()
    server.stop()
