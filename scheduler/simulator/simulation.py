"""One simulation: a scenario's arrivals through the live system's `SchedulerCore` onto simulated nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

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
from perllm.scheduler.simulator.capacity import capacity, step_table_of
from perllm.scheduler.simulator.clock import Clock
from perllm.scheduler.simulator.node import Attempt, SimulatedNode
from perllm.scheduler.simulator.oracles import ORACLES
from perllm.scheduler.simulator.result import Outcome, RunResult
from perllm.scheduler.simulator.scenario import Loss, Replay, Scenario, Texts, node_names
from perllm.scheduler.simulator.workload import Arrival, draw_tokens, make_arrivals, mean_task

#: Tasks left waiting are looked at again after this long, s, as in the live service.
TICK = 0.1


class Simulation:
    """Runs `scenario` under `policy` at `load` times the cluster's capacity. Everything drawn depends on `seed` only,
    so every policy meets the same tasks, noise and faults.

    `mechanisms` (see `policies.MECHANISMS_ADDED`) are on or off as the policy's name says, but for admission, which is
    the policy's own; given, they override that, and `abort` whether tasks are stopped at their deadline. `arrivals`
    replace the scenario's. `listen` hears every event of the stream. `options` are the keywords of a policy given by
    name.
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
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.scenario, self.load, self.seed = scenario, load, seed
        self.clock = Clock(scenario.start)
        self.rate = load * sum(capacity(scenario).values())
        self.arrivals = arrivals if arrivals is not None else make_arrivals(scenario, self.rate, seed)
        self._is_replay, self._listen = arrivals is not None, listen
        self.outcomes: dict[str, Outcome] = {}
        self.name = policy if isinstance(policy, str) else policy.name
        if mechanisms is None:
            mechanisms = has_mechanisms(self.name)
        self._by_id = {a.event.id: a for a in self.arrivals}
        self._strikes: dict[str, int] = {}
        self._ticking = False
        self.nodes: dict[str, SimulatedNode] = {}
        self._make_nodes(abort=mechanisms if abort is None else abort)
        if isinstance(policy, str):
            given = options or {}
            policy = ORACLES[policy](self, **given) if policy in ORACLES else make_policy(policy, seed, **given)
        self.core = SchedulerCore(policy, **core_options(scenario.queue_room, mechanisms=mechanisms), explain=False)
        for node in self.nodes.values():
            node.boot()
        self._next = 0
        self._schedule_arrival()

    def _make_nodes(self, *, abort: bool) -> None:
        scenario, seed = self.scenario, self.seed
        prompt, output, _ = mean_task(scenario)
        specs = [(name, spec) for spec in scenario.node for name in node_names(spec)]
        for index, (name, spec) in enumerate(specs):
            self.nodes[name] = SimulatedNode(
                name,
                spec,
                step_table_of(spec),
                self.clock,
                self.emit,
                abort=abort,
                mean_task=(round(prompt), round(output)),
                faults=scenario.fault,
                lease=scenario.lease,
                boot_error=scenario.boot_error.get(name, 1.0),
                rng=np.random.default_rng([seed, 2, index]),
            )
            self.clock.at(
                scenario.start + scenario.heartbeat * (index + 1) / len(specs), partial(self._heartbeat, name)
            )
        for fault in scenario.fault:
            if isinstance(fault, Loss):
                for name in fault.nodes:
                    begin = scenario.start + fault.start
                    self.clock.at(begin, self.nodes[name].die)
                    self.clock.at(begin + scenario.lease, partial(self._detect_loss, name))
                    self.clock.at(scenario.start + fault.end, self.nodes[name].boot)

    def decide_at(self, when: float) -> None:
        """Let the core decide at this moment, too."""
        self.clock.at(when, self._decide)

    def run(self) -> RunResult:
        """Simulate until every task has ended."""
        began = time.perf_counter()
        while len(self.outcomes) < len(self.arrivals):
            self.clock.step()
        return self._result(wall=time.perf_counter() - began)

    def _result(self, *, wall: float) -> RunResult:
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
        return RunResult(
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
        if self._is_replay or isinstance(scenario.arrivals, Replay | Texts):
            found: dict[str, list[float]] = {}
            for arrival in self.arrivals:
                found.setdefault(arrival.event.service, []).append(arrival.output)
            return {name: np.array(lengths) for name, lengths in found.items()}
        rng = np.random.default_rng(0)
        return {s.name: draw_tokens(s.output, 8192, rng, s.max_tokens) for s in scenario.service}

    # --- events and decisions

    def emit(self, event: Event) -> None:
        """An event of the stream: the core takes it, and decides where it can have changed something."""
        self._publish(event)
        if not isinstance(event, Claimed | Dispatched):
            self._decide()

    def _publish(self, event: Event) -> None:
        match event:
            case Completed() | Ended():
                self._record(event)
            case Returned():
                self._strikes[event.id] = event.strikes
        if self._listen is not None:
            self._listen(event)
        self.core.handle(event)

    def _schedule_arrival(self) -> None:
        if self._next < len(self.arrivals):
            self.clock.at(self.arrivals[self._next].event.at, self._arrive)

    def _arrive(self) -> None:
        event = self.arrivals[self._next].event
        self._next += 1
        self._schedule_arrival()
        self.emit(event)

    def _heartbeat(self, name: str) -> None:
        if self.nodes[name].alive:
            self.nodes[name].heartbeat()
        self.clock.at(self.clock.now + self.scenario.heartbeat, partial(self._heartbeat, name))

    def _detect_loss(self, name: str) -> None:
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
            self._publish(Ended.model_construct(at=now, id=task.id, state=state, reason=sentence, node=None))
            return
        assert decision.node is not None
        assert decision.model is not None
        self._publish(
            Dispatched.model_construct(
                at=now, id=task.id, node=decision.node.name, model=decision.model, attempt=task.attempt
            )
        )
        attempt = Attempt(self._by_id[task.id], task.attempt, self._strikes.get(task.id, 0))
        node = self.nodes[decision.node.name]
        self.clock.at(now + self.scenario.dispatch_delay, partial(node.accept, attempt))

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
