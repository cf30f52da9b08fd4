"""One simulation: a scenario's arrivals through the live system's `SchedulerCore` onto simulated nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from perllm.broker.messages import (
    Claimed,
    Completed,
    Dispatched,
    Ended,
    Event,
    NodeDown,
    Returned,
    State,
)
from perllm.scheduler.core.policy import Policy
from perllm.scheduler.core.scheduler import Decision, SchedulerCore
from perllm.scheduler.policies import core_options, has_mechanisms, make_policy
from perllm.scheduler.simulator.clock import Clock
from perllm.scheduler.simulator.node import Job, SimNode
from perllm.scheduler.simulator.oracles import ORACLES
from perllm.scheduler.simulator.result import Outcome, Run
from perllm.scheduler.simulator.scenario import Loss, NodeSpec, Replay, Scenario, names_of
from perllm.scheduler.simulator.tables import StepTable, load_table
from perllm.scheduler.simulator.workload import Arrival, make_arrivals, mean_task, tokens

#: Tasks left waiting are looked at again after this long, s, as in the live service.
TICK = 0.1


def table_of(spec: NodeSpec) -> StepTable:
    """The node's true step times. Raises BadSetting."""
    watts = None
    if spec.idle_watts is not None and spec.active_watts is not None:
        watts = (spec.idle_watts, spec.active_watts)
    return load_table(spec.profile, spec.slots, time=spec.time, power=spec.power, cpu_watts=watts)


def capacity(scenario: Scenario) -> dict[str, float]:
    """Tasks/s each node finishes when every slot is always taken by the scenario's mean task: its prefill, and its
    share of the steps of a full batch. Load 1.0 is the sum."""
    prompt, output, reserve = mean_task(scenario)
    found: dict[str, float] = {}
    for spec in scenario.node:
        table = table_of(spec)
        batch = max(1, min(spec.slots, int(spec.kv_tokens / reserve)))
        step = table.decode(batch, batch * (prompt + output / 2))
        prefill = table.prefill(prompt) - table.prefill_seconds[0]
        found |= dict.fromkeys(names_of(spec), 1.0 / (prefill + output * step / batch))
    return found


class Simulation:
    """Runs `scenario` under `policy` at `load` times the cluster's capacity. Everything drawn depends on `seed` only,
    so every policy meets the same tasks, noise and faults.

    `mechanisms` (None: as the policy's name says) are EDF, short node queues and stopping at the deadline; `abort`
    overrides the last. `arrivals` replace the scenario's. `listen` hears every event of the stream.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: str | Policy,
        *,
        load: float,
        seed: int,
        mechanisms: bool | None = None,
        abort: bool | None = None,
        arrivals: list[Arrival] | None = None,
        listen: Callable[[Event], None] | None = None,
    ) -> None:
        self.scenario, self.load, self.seed = scenario, load, seed
        self.clock = Clock(scenario.start)
        self.rate = load * sum(capacity(scenario).values())
        self.arrivals = arrivals if arrivals is not None else make_arrivals(scenario, self.rate, seed)
        self._recorded, self._listen = arrivals is not None, listen
        self.outcomes: dict[str, Outcome] = {}
        self.name = policy if isinstance(policy, str) else policy.name
        if mechanisms is None:
            mechanisms = has_mechanisms(self.name)
        self._by_id = {a.event.id: a for a in self.arrivals}
        self._strikes: dict[str, int] = {}
        self._ticking = False
        self.nodes: dict[str, SimNode] = {}
        self._make_nodes(abort=mechanisms if abort is None else abort)
        if isinstance(policy, str):
            policy = ORACLES[policy](self) if policy in ORACLES else make_policy(policy, seed)
        options = core_options(scenario.queue_room, mechanisms=mechanisms)
        self.core = SchedulerCore(policy, **options, explain=False)
        for node in self.nodes.values():
            node.boot()
        self._next = 0
        self._arrive_at()

    def _make_nodes(self, *, abort: bool) -> None:
        scenario, seed = self.scenario, self.seed
        prompt, output, _ = mean_task(scenario)
        specs = [(name, spec) for spec in scenario.node for name in names_of(spec)]
        for index, (name, spec) in enumerate(specs):
            self.nodes[name] = SimNode(
                name,
                spec,
                table_of(spec),
                self.clock,
                self.emit,
                abort=abort,
                mean_task=(round(prompt), round(output)),
                faults=scenario.fault,
                lease=scenario.lease,
                boot_error=scenario.boot_error.get(name, 1.0),
                rng=np.random.default_rng([seed, 2, index]),
            )
            self.clock.at(scenario.start + scenario.heartbeat * (index + 1) / len(specs), partial(self._beat, name))
        for fault in scenario.fault:
            if isinstance(fault, Loss):
                for name in fault.nodes:
                    begin = scenario.start + fault.start
                    self.clock.at(begin, self.nodes[name].die)
                    self.clock.at(begin + scenario.lease, partial(self._notice, name))
                    self.clock.at(scenario.start + fault.end, self.nodes[name].boot)

    def run(self) -> Run:
        """Simulate until every task has ended."""
        began = time.perf_counter()
        while len(self.outcomes) < len(self.arrivals):
            self.clock.step()
        return self._figures(wall=time.perf_counter() - began)

    def _figures(self, *, wall: float) -> Run:
        outcomes = tuple(self.outcomes[a.event.id] for a in self.arrivals)
        span = max(self.arrivals[-1].event.at - self.arrivals[0].event.at, 1e-9)
        states = [o.state for o in outcomes]
        good = sum(o.on_time for o in outcomes)
        latencies = [o.ended - o.submitted for o in outcomes if o.state is State.SUCCEEDED] or [float("nan")]
        nodes = self.nodes.values()
        active = sum(n.joules + n.engine.joules for n in nodes)
        links = sum(
            self.nodes[o.node].spec.link.joules_per_byte * a.event.payload_bytes
            for o, a in zip(outcomes, self.arrivals, strict=True)
            if o.node is not None
        )
        per_task = 1.0 / good if good else float("nan")
        return Run(
            policy=self.name,
            load=self.load,
            seed=self.seed,
            tasks=len(outcomes),
            on_time=good / len(outcomes),
            on_time_value=sum(o.value for o in outcomes if o.on_time) / sum(o.value for o in outcomes),
            goodput=good / span,
            tokens_s=sum(o.tokens for o in outcomes) / span,
            joules=(active + links) * per_task,
            joules_idle=sum(n.table.idle_watts for n in nodes) * span * per_task,
            latency_p50=float(np.percentile(latencies, 50)),
            latency_p95=float(np.percentile(latencies, 95)),
            rejected=states.count(State.REJECTED),
            expired=states.count(State.EXPIRED),
            late=sum(o.state is State.SUCCEEDED and not o.on_time for o in outcomes),
            failed=states.count(State.FAILED),
            wall=wall,
            outcomes=outcomes,
        )

    def arrival(self, task_id: str) -> Arrival:
        """The truth about a task."""
        return self._by_id[task_id]

    def true_lengths(self) -> dict[str, NDArray[np.float64]]:
        """Per service class, output lengths (tokens) of the distribution its tasks are drawn from; the tasks' own
        where they are recorded ones."""
        scenario = self.scenario
        if self._recorded or isinstance(scenario.arrivals, Replay):
            found: dict[str, list[float]] = {}
            for arrival in self.arrivals:
                found.setdefault(arrival.event.service, []).append(arrival.output)
            return {name: np.array(lengths) for name, lengths in found.items()}
        rng = np.random.default_rng(0)
        return {s.name: tokens(s.output, 8192, rng, s.max_tokens) for s in scenario.service}

    # --- what happens

    def emit(self, event: Event) -> None:
        """An event of the stream: the core takes it, and decides where it can have changed something."""
        self._tell(event)
        if not isinstance(event, Claimed | Dispatched):
            self._decide()

    def _tell(self, event: Event) -> None:
        match event:
            case Completed() | Ended():
                self._record(event)
            case Returned():
                self._strikes[event.id] = event.strikes
        if self._listen is not None:
            self._listen(event)
        self.core.handle(event)

    def _arrive_at(self) -> None:
        if self._next < len(self.arrivals):
            self.clock.at(self.arrivals[self._next].event.at, self._arrive)

    def _arrive(self) -> None:
        event = self.arrivals[self._next].event
        self._next += 1
        self._arrive_at()
        self.emit(event)

    def _beat(self, name: str) -> None:
        if self.nodes[name].alive:
            self.nodes[name].heartbeat()
        self.clock.at(self.clock.now + self.scenario.heartbeat, partial(self._beat, name))

    def _notice(self, name: str) -> None:
        if not self.nodes[name].alive:
            self.emit(NodeDown.model_construct(at=self.clock.now, node=name, reason="no heartbeat"))

    def _tick(self) -> None:
        self._ticking = False
        self._decide()

    def _decide(self) -> None:
        for decision in self.core.decide(self.clock.now):
            self._apply(decision)
        if len(self.core.pending) and not self._ticking:
            self._ticking = True
            self.clock.at(self.clock.now + TICK, self._tick)

    def _apply(self, decision: Decision) -> None:
        task, now = decision.task, self.clock.now
        if decision.action != "dispatch":
            state = State.REJECTED if decision.action == "reject" else State.EXPIRED
            sentence = decision.explanation.sentence
            self._tell(Ended.model_construct(at=now, id=task.id, state=state, reason=sentence, node=None))
            return
        assert decision.node is not None
        assert decision.model is not None
        self._tell(
            Dispatched.model_construct(
                at=now, id=task.id, node=decision.node.name, model=decision.model, attempt=task.attempt
            )
        )
        job = Job(self._by_id[task.id], task.attempt, self._strikes.get(task.id, 0))
        node = self.nodes[decision.node.name]
        self.clock.at(now + self.scenario.dispatch_delay, partial(node.accept, job))

    def _record(self, event: Completed | Ended) -> None:
        assert event.id not in self.outcomes, f"{event.id} ended twice"
        submitted = self._by_id[event.id].event
        receipt = event.receipt if isinstance(event, Completed) else None
        self.outcomes[event.id] = Outcome(
            submitted=submitted.at,
            deadline=submitted.deadline,
            ended=event.at,
            state=event.state,
            on_time=isinstance(event, Completed) and event.on_time,
            value=submitted.value,
            node=event.node,
            tokens=receipt.completion_tokens if receipt else 0,
            joules=receipt.energy.inference + receipt.energy.transfer if receipt else 0.0,
        )
