"""The part of a worker around its engine: register, heartbeat, claim, run, complete, hand back.

One `NodeWorker` per process. Celery threads call `run`; one more thread sends heartbeats: each renews every running
attempt's lease and returns which of them must stop. A cancel wakes it at once through the node's signal channel. While
no scheduler leads, it also does what of its work nobody can wait for: ends what is overdue, frees what dead nodes held.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, assert_never
from uuid import uuid4

import redis
import structlog
from pydantic import ValidationError

from perllm.broker import grammar
from perllm.broker.engine.checks import embeddings_excess
from perllm.broker.engine.contract import Engine, EngineDown, EngineError, Generation, Stop, counters_or_none
from perllm.broker.errors import (
    BadSetting,
    InvalidTask,
    TaskExpired,
    TaskFailed,
    TryAgain,
    Unreachable,
    field_errors,
)
from perllm.broker.ledger import Claim, Ledger
from perllm.broker.messages import Choice, Counters, Energy, Heartbeat, NodeInfo, Receipt, TaskSpec, whole_text
from perllm.broker.worker.settings import WorkerSettings
from perllm.broker.worker.text_publisher import TextPublisher

#: Seconds a worker keeps trying to deliver a result to a server that does not answer.
DELIVERY_TIMEOUT = 60.0
#: Seconds an engine must be found stuck, at every heartbeat: a process that was frozen itself finds it so for a moment.
STUCK_CONFIRMED = 3.0
#: The exit status of a worker whose engine is stuck (EX_SOFTWARE): who supervises it starts it anew.
STUCK_STATUS = 70
#: Longest reason of a failure that is kept, characters: engines quote what they were given.
MAX_REASON = 2000
#: The reason given for work handed back by a graceful stop.
STOPPING = "the worker is stopping"

#: Least time before its deadline at which an answer that may be cut ends, s: what completing it takes a busy server.
DELIVERY_SECONDS = 0.1

log = structlog.get_logger(__name__)
T = TypeVar("T")
C = TypeVar("C", bound=Choice)


def may_be_cut(spec: TaskSpec) -> bool:
    """Whether an answer that is not complete at the deadline is still one: not where it must have a form."""
    formed = spec.json_schema is not None or spec.grammar is not None or spec.tool_choice == "required"
    return spec.fit_context and not formed


def cut_at_deadline(done: Generation) -> Generation:
    """An answer that the deadline ended, as one that is as long as it could be; one that had not begun stays."""
    if done.output.finish_reason != "deadline" or not done.completion_tokens:
        return done
    more = tuple(_cut(choice) for choice in done.output.more)
    return replace(done, output=_cut(done.output.model_copy(update={"more": more})))


def _cut(choice: C) -> C:
    return choice.model_copy(update={"finish_reason": "length"}) if choice.finish_reason == "deadline" else choice


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt this worker runs."""

    number: int
    token: str
    stop: Stop
    deadline: float  # of the task, s, `time.monotonic()`


class NodeWorker:
    """Runs the attempts dispatched to one node. `engine` is started; `info` describes it."""

    def __init__(self, settings: WorkerSettings, ledger: Ledger, engine: Engine, info: NodeInfo) -> None:
        self.info = info
        self._settings = settings
        self._ledger = ledger
        self._engine = engine
        self._entered: dict[str, int] = {}  # tasks a thread is at work on, and the attempt's number
        self._running: dict[str, _Attempt] = {}  # those of them that are claimed
        self._changed = threading.Condition()  # of these two
        self._stopping = threading.Event()
        self._handing_back = threading.Event()
        self._closed = threading.Event()
        self._out_of_service = False  # while the engine is down
        self._service_lock = threading.Lock()
        self._stuck_since: float | None = None
        self._heartbeats = threading.Thread(target=self._beat_until_closed, name="perllm-heartbeat", daemon=True)

    # --- service

    def start(self) -> None:
        """Register and begin the heartbeats. Waits for a dead namesake's registration to lapse; raises BadSetting when
        one lives."""
        self._register()
        self._heartbeats.start()
        log.info("node_up", node=self.info.name, queue=self.info.queue, slots=self.info.slots, engine=self.info.engine)

    def drain(self) -> None:
        """Graceful stop: unstarted work goes back at once, running work may finish within the grace period and is
        handed back after it. Returns when nothing runs."""
        log.info("node_draining", node=self.info.name, running=len(self._running))
        self._stopping.set()
        self._best_effort(lambda: self._ledger.drain(self.info.name, self.info.boot, STOPPING))
        with self._changed:
            if not self._changed.wait_for(lambda: not self._entered, timeout=self._settings.grace):
                self._handing_back.set()
                for attempt in self._running.values():
                    attempt.stop.cancel()
                self._changed.wait_for(lambda: not self._entered, timeout=self._settings.lease)

    def close(self) -> None:
        """Leave the cluster and free the engine. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._heartbeats.is_alive():
            self._heartbeats.join(timeout=5)
        self._best_effort(lambda: self._ledger.leave(self.info.name, self.info.boot, "the worker stopped"))
        self._engine.close()
        log.info("node_left", node=self.info.name)

    # --- one attempt

    def run(self, task_id: str, number: int) -> str:
        """Claim and run one attempt; returns a line for people (Flower shows it). Void attempts do nothing.

        Raises TaskFailed or TaskExpired when the task ended so, after the ledger knows.
        """
        if not self._enter(task_id, number):
            return "void: an attempt at this task is here already"
        try:
            return self._run_attempt(task_id, number)
        finally:
            with self._changed:
                del self._entered[task_id]
                self._running.pop(task_id, None)
                self._changed.notify_all()

    def _enter(self, task_id: str, number: int) -> bool:
        """Whether this attempt may begin. One that lost its lease may still be here when the next is sent: it is
        stopped first, so that the engine never has a task twice."""
        with self._changed:
            if self._entered.get(task_id, number) < number:
                if older := self._running.get(task_id):
                    older.stop.cancel()
                self._changed.wait_for(lambda: task_id not in self._entered, timeout=self._settings.lease)
            if task_id in self._entered:
                return False
            self._entered[task_id] = number
            return True

    def _run_attempt(self, task_id: str, number: int) -> str:
        token = uuid4().hex

        def try_claim() -> tuple[Claim | None, float]:
            began = time.monotonic()
            claim = self._ledger.claim(task_id, number, self.info.name, token)
            return claim, time.monotonic() - began

        # The message is gone: only this brings the work.
        claim, transfer = self._until_delivered(try_claim) or (None, 0.0)
        if claim is None:
            log.info("attempt_void", task_id=task_id, attempt=number)
            return "void: placed elsewhere, cancelled or expired meanwhile"
        attempt = _Attempt(number, token, Stop(claim.deadline), time.monotonic() + claim.deadline)
        with self._changed:
            self._running[task_id] = attempt
            if self._handing_back.is_set():
                attempt.stop.cancel()
        return self._run_claimed(task_id, attempt, claim, transfer)

    def _run_claimed(self, task_id: str, attempt: _Attempt, claim: Claim, transfer: float) -> str:
        try:
            spec = TaskSpec.model_validate_json(claim.payload).model_copy(update={"model": claim.model})
        except ValidationError as error:
            reason = f"the payload is of another version: {field_errors(error)}"
            return self._failed(task_id, attempt, reason, retry=True)
        with structlog.contextvars.bound_contextvars(**spec.origin()):
            log.info("task_claimed", attempt=attempt.number, model=claim.model, transfer=round(transfer, 4))
            return self._run_task(task_id, attempt, claim, spec, transfer)

    def _run_task(self, task_id: str, attempt: _Attempt, claim: Claim, spec: TaskSpec, transfer: float) -> str:
        try:
            grammar.check(spec)
            self._check_size(spec)
            publisher = TextPublisher(self._ledger, task_id, attempt.number, attempt.token) if spec.stream else None
            if may_be_cut(spec):
                attempt.stop.bring_forward(self._time_to_deliver(claim, transfer))
            done = self._engine.generate(task_id, spec, attempt.stop, publisher)
            if may_be_cut(spec) and time.monotonic() < attempt.deadline:
                done = cut_at_deadline(done)
        except EngineDown as error:
            reason = str(error)
            self._leave_service(reason)  # before the task goes back, or it could come straight here again
            if error.inside:
                return self._failed(task_id, attempt, reason, retry=True)
            self._until_delivered(lambda: self._ledger.hand_back(task_id, attempt.number, attempt.token, reason))
            log.info("task_handed_back", attempt=attempt.number, reason=reason)
            return f"handed back: {reason}"
        except EngineError as error:
            return self._failed(task_id, attempt, str(error), retry=error.retry)
        except InvalidTask as error:
            return self._failed(task_id, attempt, str(error), retry=isinstance(error, TryAgain))
        except Exception as error:  # an engine's bug must not take the attempt's record with it
            log.exception("engine_error", task_id=task_id)
            return self._failed(task_id, attempt, f"{type(error).__name__}: {error}", retry=True)
        return self._deliver(task_id, attempt, done, self._receipt(attempt, done, claim, transfer))

    def _check_size(self, spec: TaskSpec) -> None:
        """Raises InvalidTask where what it asks for is more than may be stored."""
        offer = self.info.offer(spec.model)
        if offer is None or offer.dimensions is None:
            return
        if excess := embeddings_excess(spec, offer.dimensions, self._settings.max_result_bytes):
            raise InvalidTask(f"inputs: {excess}")

    def _deliver(self, task_id: str, attempt: _Attempt, done: Generation, receipt: Receipt) -> str:
        ledger, number, token = self._ledger, attempt.number, attempt.token
        cost = f"{done.completion_tokens} tokens, {receipt.energy.total:.2f} J ({receipt.energy.method})"
        said: dict[str, float] = {"tokens": done.completion_tokens, "joules": round(receipt.energy.total, 4)}
        said |= {name: round(getattr(receipt, name), 4) for name in ("wait", "prefill", "decode")}
        match done.finish:
            case "stop" | "length" | "tool_calls":
                verdict = self._until_delivered(
                    lambda: ledger.complete(task_id, number, token, "succeeded", done.output, receipt)
                )
                log.info("task_ended", attempt=number, state="succeeded", verdict=verdict, **said)
                return f"{verdict}: {cost}"
            case "deadline":
                reason = f"the deadline passed after {done.completion_tokens} tokens"
                self._until_delivered(
                    lambda: ledger.complete(task_id, number, token, "expired", done.output, receipt, reason)
                )
                log.info("task_ended", attempt=number, state="expired", **said)
                raise TaskExpired(reason)
            case "cancelled":
                if self._handing_back.is_set():
                    self._until_delivered(lambda: ledger.hand_back(task_id, number, token, STOPPING))
                    log.info("task_handed_back", attempt=number, reason=STOPPING, **said)
                    return f"handed back after {cost}"
                log.info("task_stopped", attempt=number, **said)
                return f"stopped after {cost}"
            case _:
                assert_never(done.finish)

    def _failed(self, task_id: str, attempt: _Attempt, reason: str, *, retry: bool) -> str:
        reason = whole_text(reason[:MAX_REASON])
        log.warning("attempt_failed", task_id=task_id, attempt=attempt.number, reason=reason, retry=retry)
        self._until_delivered(lambda: self._ledger.fail(task_id, attempt.number, attempt.token, reason, retry=retry))
        raise TaskFailed(reason)

    def _time_to_deliver(self, claim: Claim, transfer: float) -> float:
        """Seconds before its deadline at which an answer that may be cut ends: so long the engine may need to notice
        and the result to travel, both ways as long as the claim took; a fifth of the time left at most."""
        step = counters_or_none(self._engine).longest_step
        return min(DELIVERY_SECONDS + 2 * (step + transfer), claim.deadline / 5)

    def _receipt(self, attempt: _Attempt, done: Generation, claim: Claim, transfer: float) -> Receipt:
        joules = len(claim.payload) * self.info.power.joules_per_byte
        energy: Energy = done.energy.model_copy(update={"transfer": joules})
        return Receipt(
            node=self.info.name,
            model=done.model,
            attempt=attempt.number,
            payload_bytes=len(claim.payload),
            transfer=transfer,
            wait=done.wait,
            prefill=done.prefill,
            decode=done.decode,
            prompt_tokens=done.prompt_tokens,
            cached_tokens=done.cached_tokens,
            completion_tokens=done.completion_tokens,
            cut=any(choice.finish_reason in ("length", "deadline") for choice in done.output.choices),
            choice_tokens=tuple(choice.tokens for choice in done.output.choices) if done.output.more else (),
            energy=energy,
            before=done.before,
            after=done.after,
            stalled=done.stalled,
        )

    def _until_delivered(self, deliver: Callable[[], T]) -> T | None:
        """Repeat a call while the server does not answer: a result is too costly to drop for a network fault, and
        repeating is harmless. None after `DELIVERY_TIMEOUT`: the lease has lapsed, and the task is placed anew."""
        give_up = time.monotonic() + DELIVERY_TIMEOUT
        while True:
            try:
                return deliver()
            except Unreachable as error:
                log.warning("delivery_delayed", reason=str(error))
                if time.monotonic() > give_up:
                    return None
                self._closed.wait(0.5)

    @staticmethod
    def _best_effort(call: Callable[[], object]) -> None:
        """For a departure: without a server, leases lapse by themselves."""
        try:
            call()
        except Unreachable as error:
            log.warning("departure_not_recorded", reason=str(error))

    # --- heartbeat

    def _register(self) -> None:
        give_up = time.monotonic() + 2 * self._settings.lease + 2 * self._settings.heartbeat
        while (taken := self._ledger.register(self.info)) is not None:
            if time.monotonic() > give_up:
                raise BadSetting(f"a node named {self.info.name!r} is already in service: set another PERLLM_NODE_NAME")
            log.info("node_name_taken", node=self.info.name, seconds=taken)
            time.sleep(min(taken + 0.05, 1.0))
        if self._stopping.is_set():  # it lapsed while it was stopping: it is back only to finish what it runs
            self._ledger.drain(self.info.name, self.info.boot, STOPPING)

    def _beat_until_closed(self) -> None:
        while not self._closed.is_set():
            try:
                with self._ledger.signals(self.info.name) as signals:
                    while not self._closed.is_set():
                        self._beat()
                        self._await_next_beat(signals)
            except (Unreachable, redis.exceptions.RedisError) as error:
                log.warning("heartbeat_missed", node=self.info.name, reason=str(error))
                self._closed.wait(self._settings.heartbeat)
            except BadSetting as error:
                log.error("node_name_lost", reason=str(error))
                self._closed.wait(self._settings.lease)
            except Exception:  # a bug, or what an engine says of one task, must not end the heartbeat of all
                log.exception("heartbeat_failed", node=self.info.name)
                self._closed.wait(self._settings.heartbeat)

    def _await_next_beat(self, signals: redis.client.PubSub) -> None:
        """Sleep until the next beat is due or somebody cancels a task here."""
        due = time.monotonic() + self._settings.heartbeat
        while not self._closed.is_set() and (left := due - time.monotonic()) > 0:
            if signals.get_message(timeout=min(left, 0.2)) is not None:
                return

    def _leave_service(self, reason: str) -> None:
        """The engine is down: nothing more is to be sent here until it is back."""
        with self._service_lock:
            if not self._out_of_service:
                self._out_of_service = True
                log.warning("node_away", node=self.info.name, reason=reason)
                self._best_effort(lambda: self._ledger.drain(self.info.name, self.info.boot, reason))

    def _counters(self) -> Counters:
        """The engine's counters; none while it is down. Notes that it went or came back."""
        try:
            counters = self._engine.counters()
        except EngineDown as error:
            self._leave_service(str(error))
            return Counters()
        if self._out_of_service:
            self._register()
            self._out_of_service = False
            log.info("node_back", node=self.info.name)
        return counters

    def _watch_engine(self) -> None:
        """End the process if its engine is stuck: native code cannot be stopped otherwise. The tasks it was computing
        get a strike, all others go back without one."""
        stuck, now = self._engine.stuck(), time.monotonic()
        if stuck is None:
            self._stuck_since = None
            return
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since < STUCK_CONFIRMED:
            return
        reason = f"{stuck.reason}; the worker starts anew"
        log.error("engine_stuck", node=self.info.name, reason=stuck.reason, tasks=sorted(stuck.tasks))
        try:
            with self._changed:
                running = dict(self._running)
            self._ledger.drain(self.info.name, self.info.boot, reason)
            for task_id in stuck.tasks & running.keys():
                attempt = running[task_id]
                self._ledger.fail(task_id, attempt.number, attempt.token, reason, retry=True)
            self._ledger.leave(self.info.name, self.info.boot, reason)
        finally:
            os._exit(STUCK_STATUS)

    def _beat(self) -> None:
        self._watch_engine()
        counters = self._counters()
        with self._changed:
            running = dict(self._running)
        heartbeat = Heartbeat(
            at=0.0,  # the server writes its own time
            node=self.info.name,
            boot=self.info.boot,
            counters=counters,
            progress=dict(self._engine.progress()),
        )
        must_stop = self._ledger.beat(heartbeat, [(i, a.number, a.token) for i, a in running.items()])
        if must_stop is None:
            if not self._out_of_service:
                self._register()
            return
        for task_id in must_stop:
            log.info("attempt_stopped", task_id=task_id)
            running[task_id].stop.cancel()
        if not self._ledger.led():  # deadlines and leases hold all the same
            self._ledger.sweep()
