"""A simulated worker: its queue, slots, link and engine, and the events it reports."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from perllm.scheduler.simulator.engine import Engine
from perllm.scheduler.simulator.engine import Sequence as Generation
from perllm.scheduler.simulator.link import SharedLink, Transfer
from perllm.scheduler.simulator.scenario import Fault, NodeSpec
from perllm.scheduler.simulator.speed_changes import BandwidthPace, SpeedPace, link_changes, speed_changes
from perllm.scheduler.simulator.tables import StepTable
from perllm.scheduler.simulator.workload import Arrival

#: Attempts that may end without a result before a task fails (the live default).
MAX_STRIKES = 3


@dataclass(slots=True, eq=False)
class Job:
    """One attempt at one task on one node."""

    arrival: Arrival
    attempt: int
    strikes: int
    claimed: float | None = None  # s
    arrived: float | None = None  # s, its payload
    transfer: Transfer | None = None
    generation: Generation | None = None
    alarm: Timer | None = None  # at its deadline

    @property
    def id(self) -> str:
        return self.arrival.event.id


class SimNode:
    """Takes jobs in order of arrival, `slots` at a time; each claims its payload over the link, then generates.

    With `abort`, a job stops at its deadline wherever it is; without, it runs to its end, late or not. `emit` gets
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
        self.pace = SpeedPace(spec, speed_changes(name, faults, begin, rng), begin, rng)
        self.link_pace = BandwidthPace(spec.link, link_changes(name, faults, begin), begin, rng)
        self._stalls = [c for c in self.pace.changes if math.isinf(c.factor)]
        self._boot_error = boot_error
        self._calibration = table.calibration(prompt=mean_task[0], output=mean_task[1])
        self._boots = 0
        self._lost: list[Job] = []
        self.alive = False
        self.joules = 0.0  # of engines that are gone, idle power apart

    # --- life

    def boot(self) -> None:
        """Start, empty."""
        for job in [*self._lost]:
            self._give_up(job)
        self._boots += 1
        self.alive = True
        self._queue: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._link = SharedLink(self._clock, self.link_pace)
        self.engine = Engine(
            self._clock,
            self.table,
            self.pace,
            slots=self.spec.slots,
            kv_tokens=self.spec.kv_tokens,
            chunk=self.spec.chunk,
        )
        self._emit(NodeUp.model_construct(at=self._clock.now, info=self.info()))

    def die(self) -> None:
        """Lose everything, without a word: each task is pending again when its lease has run out."""
        self.alive = False
        self.joules += self.engine.joules
        self.engine.halt()
        self._link.halt()
        for job in [*self._running.values(), *self._queue]:
            self._finish(job)
            self._lose(job)

    def _lose(self, job: Job) -> None:
        """A job this dead node held is pending again when its lease has run out, or the node is back."""
        self._lost.append(job)
        self._clock.at(self._clock.now + self._lease, lambda: self._give_up(job))

    def _give_up(self, job: Job) -> None:
        if job not in self._lost:
            return
        self._lost.remove(job)
        strikes = job.strikes + (job.claimed is not None)  # what was not running yet has no strike
        if strikes >= MAX_STRIKES:
            self._emit(self._ended(job, State.FAILED, f"{strikes} attempts ended without a result"))
            return
        self._emit(
            Returned.model_construct(
                at=self._clock.now,
                id=job.id,
                node=self.name,
                attempt=job.attempt,
                cause="lease_expired",
                reason="the node was lost",
                strikes=strikes,
            )
        )

    def info(self) -> NodeInfo:
        """The registration: what the node measured at boot (off by `boot_error`), its power and its link's nominal
        bandwidth."""
        spec, cal, table = self.spec, self._calibration, self.table
        wrong = cal.model_copy(update={k: v * self._boot_error for k, v in cal.model_dump().items()})
        return NodeInfo(
            name=self.name,
            tier=spec.tier,
            boot=f"{self.name}.{self._boots}",
            slots=spec.slots,
            models=(ModelOffer(name="model", context=spec.context, kv_tokens=spec.kv_tokens, calibration=wrong),),
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

    def inside(self) -> dict[str, tuple[float, int, int]]:
        """The truth about every job that has a slot: s its payload yet needs of the link, prompt tokens yet to prefill,
        tokens generated. None has one where the node is lost."""
        if not self.alive:
            return {}
        per_byte = self.link_pace.at(self._clock.now)[0]
        found = {}
        for job in self._running.values():
            if job.transfer is not None:
                found[job.id] = (self._link.left(job.transfer) * per_byte, job.arrival.event.prompt_tokens, 0)
        for task_id, generated in self.engine.progress().items():
            sequence = self._running[task_id].generation
            assert sequence is not None
            found[task_id] = (0.0, sequence.prompt - sequence.prefilled, generated)
        return found

    # --- jobs

    def accept(self, job: Job) -> None:
        """Take a job into the queue."""
        if not self.alive:
            self._lose(job)
            return
        if self._abort:
            job.alarm = self._clock.at(job.arrival.event.deadline, lambda: self._deadline(job))
        self._queue.append(job)
        self._claim()

    def _claim(self) -> None:
        while self._queue and len(self._running) < self.spec.slots:
            self._start(self._queue.popleft())

    def _start(self, job: Job) -> None:
        event = job.arrival.event
        if event.prompt_tokens >= self.spec.context:
            self._finish(job)
            reason = f"the prompt has {event.prompt_tokens} tokens, the context {self.spec.context}"
            self._emit(self._ended(job, State.FAILED, reason))
            return
        job.claimed = self._clock.now
        self._running[job.id] = job
        self._emit(Claimed.model_construct(at=job.claimed, id=job.id, node=self.name, attempt=job.attempt))
        job.transfer = self._link.send(event.payload_bytes, lambda: self._generate(job))

    def _generate(self, job: Job) -> None:
        event = job.arrival.event
        job.arrived, job.transfer = self._clock.now, None
        room = self.spec.context - event.prompt_tokens
        job.generation = Generation(
            id=job.id,
            prompt=event.prompt_tokens,
            output=min(job.arrival.output, event.max_tokens, room),
            reserve=event.prompt_tokens + min(event.max_tokens, room),
            ended=lambda _: self._complete(job),
        )
        self.engine.enter(job.generation)

    def _deadline(self, job: Job) -> None:
        """The deadline has come, and the job is not over."""
        job.alarm = None
        if job.generation is not None:
            self.engine.stop(job.generation)
        elif job.transfer is not None:
            self._link.cancel(job.transfer)
            self._complete(job)
        else:
            self._queue.remove(job)
            self._finish(job)
            self._emit(self._ended(job, State.EXPIRED, "the deadline passed in the node's queue"))

    def _complete(self, job: Job) -> None:
        """An attempt is over, whole or cut at the deadline: report its receipt, claim the next."""
        now, event, g = self._clock.now, job.arrival.event, job.generation
        assert job.claimed is not None
        self._finish(job)
        cut = g is None or (g.stopping and g.generated < g.output)
        self._emit(
            Completed.model_construct(
                at=now,
                id=job.id,
                node=self.name,
                attempt=job.attempt,
                state=State.EXPIRED if cut else State.SUCCEEDED,
                on_time=not cut and now <= event.deadline,
                latency=now - event.at,
                queued=job.claimed - event.at,
                receipt=self._receipt(job, now),
            )
        )
        self._claim()

    def _receipt(self, job: Job, now: float) -> Receipt:
        event, g, after = job.arrival.event, job.generation, self.engine.counters()
        assert job.claimed is not None
        arrived = now if job.arrived is None else job.arrived
        started = now if g is None or g.started is None else g.started
        first = now if g is None or g.first_token is None else g.first_token
        return Receipt.model_construct(
            node=self.name,
            model="model",
            attempt=job.attempt,
            payload_bytes=event.payload_bytes,
            transfer=arrived - job.claimed,
            wait=started - arrived,
            prefill=first - started,
            decode=now - first,
            prompt_tokens=event.prompt_tokens if g is not None and g.started is not None else 0,
            cached_tokens=0,
            completion_tokens=g.generated if g is not None else 0,
            energy=Energy.model_construct(
                transfer=event.payload_bytes * self.spec.link.joules_per_byte,
                inference=g.joules if g is not None else 0.0,
                idle=g.idle_joules if g is not None else 0.0,
                method="emulated",
                estimated=True,
            ),
            before=g.before if g is not None else after,
            after=after,
            stalled=any(c.start < now and c.end > arrived for c in self._stalls),
        )

    def _finish(self, job: Job) -> None:
        self._running.pop(job.id, None)
        if job.alarm is not None:
            job.alarm.cancel()
            job.alarm = None

    def _ended(self, job: Job, state: State, reason: str) -> Ended:
        return Ended.model_construct(at=self._clock.now, id=job.id, state=state, reason=reason, node=self.name)
