"""A simulated worker: its queue, slots, link and engine, and the events it reports."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from perllm.broker.messages import (
    Claimed,
    Completed,
    Ended,
    Energy,
    Event,
    Heartbeat,
    ModelOffer,
    NodeInfo,
    NodeUp,
    Power,
    Receipt,
    Returned,
    State,
)
from perllm.scheduler.simulator.clock import Clock, Timer
from perllm.scheduler.simulator.engine import Engine, Request
from perllm.scheduler.simulator.link import SharedLink, Transfer
from perllm.scheduler.simulator.scenario import Fault, NodeSpec
from perllm.scheduler.simulator.speed_changes import SecondsPerByte, StepTimeFactor, link_slowdowns, node_slowdowns
from perllm.scheduler.simulator.step_table import StepTable
from perllm.scheduler.simulator.workload import Arrival

#: Attempts that may end without a result before a task fails (the live default).
MAX_STRIKES = 3


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt at one task on one node."""

    arrival: Arrival
    number: int
    strikes: int
    claimed: float | None = None  # s
    arrived: float | None = None  # s, its payload
    transfer: Transfer | None = None
    request: Request | None = None  # in the engine
    deadline_timer: Timer | None = None

    @property
    def id(self) -> str:
        return self.arrival.event.id


class InSlot(NamedTuple):
    """How far a task with a slot is."""

    transfer: float  # s its payload yet needs of the link
    prompt_left: int  # tokens yet to prefill
    generated: int  # tokens


class SimulatedNode:
    """Takes attempts in order of arrival, `slots` at a time; each gets its payload over the link, then generates.

    With `abort`, an attempt stops at its deadline wherever it is; without, it runs to its end, late or not. `emit` gets
    every event in order.
    """

    def __init__(
        self,
        name: str,
        spec: NodeSpec,
        table: StepTable,
        clock: Clock,
        emit: Callable[[Event], None],
        *,
        abort: bool,
        mean_task: tuple[int, int],
        faults: Sequence[Fault],
        lease: float,
        boot_error: float,
        rng: np.random.Generator,
    ) -> None:
        self.name, self.spec, self.table = name, spec, table
        self._clock, self._emit, self._abort, self._lease = clock, emit, abort, lease
        begin = clock.now
        self.step_time_factor = StepTimeFactor(spec, node_slowdowns(name, faults, begin, rng), begin, rng)
        self.seconds_per_byte = SecondsPerByte(spec.link, link_slowdowns(name, faults, begin), begin, rng)
        self._stalls = [s for s in self.step_time_factor.slowdowns if math.isinf(s.factor)]
        self._boot_error = boot_error
        self._calibration = table.calibration(prompt=mean_task[0], output=mean_task[1])
        self._boots = 0
        self._lost: list[Attempt] = []
        self.alive = False
        self.joules = 0.0  # of engines that are gone, idle power apart

    # --- boot and death

    def boot(self) -> None:
        """Start, empty."""
        for attempt in [*self._lost]:
            self._give_up(attempt)
        self._boots += 1
        self.alive = True
        self._queue: deque[Attempt] = deque()
        self._running: dict[str, Attempt] = {}
        self._link = SharedLink(self._clock, self.seconds_per_byte)
        self.engine = Engine(
            self._clock,
            self.table,
            self.step_time_factor,
            slots=self.spec.slots,
            kv_tokens=self.spec.kv_tokens,
            chunk=self.spec.chunk,
        )
        self._emit(NodeUp.model_construct(at=self._clock.now, info=self.info()))

    def die(self) -> None:
        """Lose everything without notice: each task is pending again when its lease has run out."""
        self.alive = False
        self.joules += self.engine.joules
        self.engine.halt()
        self._link.halt()
        for attempt in [*self._running.values(), *self._queue]:
            self._finish(attempt)
            self._lose(attempt)

    def _lose(self, attempt: Attempt) -> None:
        """A attempt this dead node held is pending again when its lease has run out, or the node is back."""
        self._lost.append(attempt)
        self._clock.at(self._clock.now + self._lease, lambda: self._give_up(attempt))

    def _give_up(self, attempt: Attempt) -> None:
        if attempt not in self._lost:
            return
        self._lost.remove(attempt)
        strikes = attempt.strikes + (attempt.claimed is not None)  # what was not running yet has no strike
        if strikes >= MAX_STRIKES:
            self._emit(self._ended(attempt, State.FAILED, f"{strikes} attempts ended without a result"))
            return
        self._emit(
            Returned.model_construct(
                at=self._clock.now,
                id=attempt.id,
                node=self.name,
                attempt=attempt.number,
                cause="lease_expired",
                reason="the node was lost",
                strikes=strikes,
            )
        )

    def info(self) -> NodeInfo:
        """The registration: what the node measured at boot (off by `boot_error`), its power and its link's nominal
        bandwidth."""
        spec, table = self.spec, self.table
        announced = {k: v * self._boot_error for k, v in self._calibration.model_dump().items()}
        calibration = self._calibration.model_copy(update=announced)
        return NodeInfo(
            name=self.name,
            tier=spec.tier,
            boot=f"{self.name}.{self._boots}",
            slots=spec.slots,
            models=(
                ModelOffer(
                    name="model",
                    context=spec.context,
                    kv_tokens=spec.kv_tokens,
                    chunk=spec.chunk,
                    calibration=calibration,
                ),
            ),
            power=Power(
                idle=table.idle_watts,
                active=table.watts[spec.slots] - table.idle_watts,
                joules_per_byte=spec.link.joules_per_byte,
                method="emulated",
                estimated=True,
            ),
            bandwidth=spec.link.bandwidth,
            engine=f"simulated from {spec.profile}",
        )

    def heartbeat(self) -> None:
        """Report counters and progress."""
        self._emit(
            Heartbeat.model_construct(
                at=self._clock.now,
                node=self.name,
                boot=f"{self.name}.{self._boots}",
                counters=self.engine.counters(),
                progress=self.engine.progress(),
                draining=False,
            )
        )

    def in_slots(self) -> dict[str, InSlot]:
        """The truth about every task that has a slot. None has one where the node is lost."""
        if not self.alive:
            return {}
        seconds_per_byte = self.seconds_per_byte.at(self._clock.now)[0]
        found = {}
        for attempt in self._running.values():
            if attempt.transfer is not None:
                found[attempt.id] = InSlot(
                    self._link.left(attempt.transfer) * seconds_per_byte, attempt.arrival.event.prompt_tokens, 0
                )
        for task_id, generated in self.engine.progress().items():
            request = self._running[task_id].request
            assert request is not None
            found[task_id] = InSlot(0.0, request.prompt - request.prefilled, generated)
        return found

    # --- attempts

    def accept(self, attempt: Attempt) -> None:
        """Take an attempt into the queue."""
        if not self.alive:
            self._lose(attempt)
            return
        if self._abort:
            attempt.deadline_timer = self._clock.at(attempt.arrival.event.deadline, lambda: self._deadline(attempt))
        self._queue.append(attempt)
        self._claim()

    def _claim(self) -> None:
        while self._queue and len(self._running) < self.spec.slots:
            self._start(self._queue.popleft())

    def _start(self, attempt: Attempt) -> None:
        event = attempt.arrival.event
        if event.prompt_tokens >= self.spec.context:
            self._finish(attempt)
            reason = f"the prompt has {event.prompt_tokens} tokens, the context {self.spec.context}"
            self._emit(self._ended(attempt, State.FAILED, reason))
            return
        attempt.claimed = self._clock.now
        self._running[attempt.id] = attempt
        self._emit(Claimed.model_construct(at=attempt.claimed, id=attempt.id, node=self.name, attempt=attempt.number))
        attempt.transfer = self._link.send(event.payload_bytes, lambda: self._generate(attempt))

    def _generate(self, attempt: Attempt) -> None:
        event = attempt.arrival.event
        attempt.arrived, attempt.transfer = self._clock.now, None
        room = self.spec.context - event.prompt_tokens
        attempt.request = Request(
            id=attempt.id,
            prompt=event.prompt_tokens,
            output=min(attempt.arrival.output, event.max_tokens, room),
            reserve=event.prompt_tokens + min(event.max_tokens, room),
            ended=lambda _: self._complete(attempt),
        )
        self.engine.enter(attempt.request)

    def _deadline(self, attempt: Attempt) -> None:
        """The deadline has come, and the attempt is not over."""
        attempt.deadline_timer = None
        if attempt.request is not None:
            self.engine.stop(attempt.request)
        elif attempt.transfer is not None:
            self._link.cancel(attempt.transfer)
            self._complete(attempt)
        else:
            self._queue.remove(attempt)
            self._finish(attempt)
            self._emit(self._ended(attempt, State.EXPIRED, "the deadline passed in the node's queue"))

    def _complete(self, attempt: Attempt) -> None:
        """An attempt is over, whole or cut at the deadline: report its receipt, claim the next."""
        now, event, request = self._clock.now, attempt.arrival.event, attempt.request
        assert attempt.claimed is not None
        self._finish(attempt)
        cut = request is None or (request.stopping and request.generated < request.output)
        self._emit(
            Completed.model_construct(
                at=now,
                id=attempt.id,
                node=self.name,
                attempt=attempt.number,
                state=State.EXPIRED if cut else State.SUCCEEDED,
                on_time=not cut and now <= event.deadline,
                latency=now - event.at,
                queued=attempt.claimed - event.at,
                receipt=self._receipt(attempt, now),
            )
        )
        self._claim()

    def _receipt(self, attempt: Attempt, now: float) -> Receipt:
        event, request, after = attempt.arrival.event, attempt.request, self.engine.counters()
        assert attempt.claimed is not None
        arrived = now if attempt.arrived is None else attempt.arrived
        started = now if request is None or request.started is None else request.started
        first = now if request is None or request.first_token is None else request.first_token
        return Receipt.model_construct(
            node=self.name,
            model="model",
            attempt=attempt.number,
            payload_bytes=event.payload_bytes,
            transfer=arrived - attempt.claimed,
            wait=started - arrived,
            prefill=first - started,
            decode=now - first,
            prompt_tokens=event.prompt_tokens if request is not None and request.started is not None else 0,
            cached_tokens=0,
            completion_tokens=request.generated if request is not None else 0,
            energy=Energy.model_construct(
                transfer=event.payload_bytes * self.spec.link.joules_per_byte,
                inference=request.joules if request is not None else 0.0,
                idle=request.idle_joules if request is not None else 0.0,
                method="emulated",
                estimated=True,
            ),
            before=request.before if request is not None else after,
            after=after,
            stalled=any(s.start < now and s.end > arrived for s in self._stalls),
        )

    def _finish(self, attempt: Attempt) -> None:
        self._running.pop(attempt.id, None)
        if attempt.deadline_timer is not None:
            attempt.deadline_timer.cancel()
            attempt.deadline_timer = None

    def _ended(self, attempt: Attempt, state: State, reason: str) -> Ended:
        return Ended.model_construct(at=self._clock.now, id=attempt.id, state=state, reason=reason, node=self.name)
