"""Whole simulations: nothing is lost, the same seed gives the same run, and queues behave as theory says."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from support.simulation import PAPER, Watched, rate_at, small

from perllm.broker.messages import Claimed, Completed, Ended, Event, Heartbeat, NodeDown, NodeUp, Returned, State
from perllm.scheduler.simulator.capacity import step_table_of
from perllm.scheduler.simulator.scenario import Scenario, load_scenario, scenario_names
from perllm.scheduler.simulator.simulation import Simulation
from perllm.scheduler.simulator.workload import make_arrivals

# --- conservation


@pytest.mark.parametrize("scenario", scenario_names())
@pytest.mark.parametrize("policy", ["least-loaded", "earliest-completion+mech"])
def test_every_task_ends_once_and_the_books_balance(scenario: str, policy: str) -> None:
    faults = [f.model_copy(update={"start": f.start / 8, "end": f.end / 8}) for f in load_scenario(scenario).fault]
    chosen = small(load_scenario(scenario), fault=tuple(faults), tasks=250)
    simulation = Watched(chosen, policy, load=1.1, seed=3)
    run = simulation.run()
    ends = Counter(e.id for e in simulation.seen if isinstance(e, Completed | Ended))
    assert set(ends.values()) <= {1}
    assert run.tasks == 250 == len(run.outcomes)
    ran = sum(o.state is State.SUCCEEDED for o in run.outcomes)
    assert ran + run.expired + run.rejected + run.failed == 250
    assert ran - run.late == round(run.on_time * 250)
    assert all(o.ended >= o.submitted for o in run.outcomes)
    assert not simulation.core.pending
    assert all(not n.in_flight for n in simulation.core.cluster.nodes.values())
    for node in simulation.nodes.values():  # what the tasks are said to have cost is what the node drew
        receipts = [e.receipt for e in simulation.seen if isinstance(e, Completed) and e.node == node.name]
        told = sum(r.energy.inference for r in receipts)
        if not any(isinstance(e, Returned) for e in simulation.seen):
            assert told == pytest.approx(node.engine.joules, rel=1e-9, abs=1e-6)
            idle = sum(r.energy.idle for r in receipts)
            assert idle == pytest.approx(node.table.idle_watts * node.engine.counters().busy, rel=1e-9, abs=1e-6)


def test_events_of_a_task_come_in_order_and_their_times_add_up() -> None:
    simulation = Watched(small(), "least-loaded", load=0.9, seed=1)
    simulation.run()
    by_task: dict[str, list[Event]] = {}
    for event in simulation.seen:
        if not isinstance(event, NodeUp | NodeDown | Heartbeat):
            by_task.setdefault(event.id, []).append(event)
    assert len(by_task) == 300
    for events in by_task.values():
        assert [e.type for e in events] == ["submitted", "dispatched", "claimed", "completed"]
        submitted, _, claimed, completed = events
        assert isinstance(completed, Completed)
        r = completed.receipt
        assert claimed.at + r.transfer + r.wait + r.prefill + r.decode == pytest.approx(completed.at)
        assert completed.latency == pytest.approx(completed.at - submitted.at)
        assert completed.queued == pytest.approx(claimed.at - submitted.at)
        for name in ("steps", "busy", "generated", "prefilled", "sequence_steps", "context_steps", "energy"):
            assert getattr(r.after, name) >= getattr(r.before, name)
        assert r.after.generated - r.before.generated >= r.completion_tokens


def test_heartbeats_report_progress_that_only_grows() -> None:
    simulation = Watched(small(), "cloud-only", load=0.4, seed=1)
    simulation.run()
    best: dict[str, int] = {}
    beats = [e for e in simulation.seen if isinstance(e, Heartbeat) and e.node == "cloud"]
    assert sum(len(b.progress) for b in beats) > 100
    lengths = {a.event.id: a.output for a in simulation.arrivals}
    for beat in beats:
        for task, tokens in beat.progress.items():
            assert best.get(task, 0) <= tokens <= lengths[task]
            best[task] = tokens
    totals = [b.counters.generated for b in beats]
    assert totals == sorted(totals)


def test_mechanisms_stop_work_at_the_deadline_and_bound_the_queues() -> None:
    scenario = small(tasks=400)
    deepest = 0

    class Deep(Watched):
        def emit(self, event: Event) -> None:
            nonlocal deepest
            super().emit(event)
            for node in self.core.cluster.nodes.values():
                deepest = max(deepest, len(node.in_flight) - node.info.slots)

    run = Deep(scenario, "round-robin+mech", load=1.5, seed=1).run()
    assert deepest == scenario.queue_room
    assert run.expired > 50
    longest_step = 0.6  # of the slowest edge, prefilling a chunk for a full batch
    deadlines = {a.event.id: a.event.deadline for a in make_arrivals(scenario, rate_at(scenario, 1.5), 1)}
    for (_, deadline), outcome in zip(deadlines.items(), run.outcomes, strict=True):
        assert outcome.ended <= deadline + longest_step
    bare = Deep(scenario, "round-robin", load=1.5, seed=1).run()
    assert deepest > 2 * scenario.queue_room
    assert bare.expired == 0
    assert max(o.ended - o.submitted for o in bare.outcomes) > 8


# --- determinism


@pytest.mark.parametrize("policy", ["thompson", "cs-ucb-paper+mech", "informed"])
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    def once(seed: int) -> str:
        figures = Simulation(small(load_scenario("stalls")), policy, load=0.8, seed=seed).run().figures()
        del figures["wall"]
        return json.dumps(figures)

    assert once(4) == once(4)
    assert once(4) != once(5)


def test_every_policy_meets_the_same_world() -> None:
    """Arrivals, noise and bandwidth depend on the seed alone."""
    first = Simulation(small(), "random", load=0.8, seed=2)
    second = Simulation(small(), "least-loaded+mech", load=0.8, seed=2)
    first.run()
    second.run()
    assert [a.event for a in first.arrivals] == [a.event for a in second.arrivals]
    for name, node in first.nodes.items():
        other = second.nodes[name]
        for t in np.linspace(0, 20, 50).tolist():
            assert node.step_time_factor.at(t) == other.step_time_factor.at(t)
            assert node.seconds_per_byte.at(t) == other.seconds_per_byte.at(t)


# --- theory


def one_server(rate_of_service: float, output: dict[str, Any], tasks: int) -> Scenario:
    """One node with one slot, no noise and no payload to speak of."""
    node = PAPER.node[-1].model_copy(update={"slots": 1, "noise": 0.0, "drift": 0.0, "time": rate_of_service})
    service = PAPER.service[0].model_dump() | {
        "prompt": {"kind": "constant", "value": 1},
        "payload": {"kind": "constant", "value": 1},
        "output": output,
        "max_tokens": 2000,
    }
    raw = PAPER.model_dump() | {
        "node": [node.model_dump()],
        "service": [service],
        "tasks": tasks,
        "dispatch_delay": 0.0,
        "heartbeat": 100.0,
    }
    return Scenario.model_validate(raw)


@pytest.mark.parametrize(
    ("output", "squared_variation"),
    [({"kind": "constant", "value": 40}, 0.0), ({"kind": "lognormal", "median": 40, "sigma": 0.8}, None)],
)
def test_one_server_waits_as_pollaczek_and_khinchine_say(
    output: dict[str, Any], squared_variation: float | None
) -> None:
    scenario = one_server(1.0, output, 12_000)
    table = step_table_of(scenario.node[0])
    simulation = Simulation(scenario, "cloud-only", load=1.0, seed=1)
    service = np.array(
        [table.prefill(1) + sum(table.decode(1, 1 + i) for i in range(1, a.output)) for a in simulation.arrivals[:4000]]
    )
    mean_service = float(service.mean())
    load = 0.7 / mean_service / rate_at(scenario, 1.0)
    simulation = Simulation(scenario, "cloud-only", load=load, seed=2)
    run = simulation.run()
    waits = np.array([o.ended - o.submitted for o in run.outcomes]).mean() - mean_service
    variation = float(service.var()) / mean_service**2
    if squared_variation is not None:
        assert variation == pytest.approx(squared_variation, abs=1e-9)
    expected = 0.7 / (1 - 0.7) * mean_service * (1 + variation) / 2
    assert waits == pytest.approx(expected, rel=0.12)


# --- faults


def faulty(fault: dict[str, Any], **more: Any) -> Scenario:
    return Scenario.model_validate(PAPER.model_dump() | {"tasks": 300, "fault": [fault], **more})


def test_a_lost_node_is_noticed_and_its_tasks_run_elsewhere() -> None:
    scenario = faulty({"kind": "loss", "nodes": ["cloud", "edge-1"], "start": 10, "end": 20})
    simulation = Watched(scenario, "least-loaded", load=0.8, seed=1)
    simulation.run()
    returned = [e for e in simulation.seen if isinstance(e, Returned)]
    assert returned
    assert all(14 <= e.at <= 20.1 and e.node in ("cloud", "edge-1") for e in returned)
    assert [(e.node, e.at) for e in simulation.seen if isinstance(e, NodeDown)] == [("cloud", 14), ("edge-1", 14)]
    for e in returned:
        ends = [x for x in simulation.seen if isinstance(x, Completed | Ended) and x.id == e.id]
        assert len(ends) == 1
        assert ends[0].at >= e.at
    quiet = [e for e in simulation.seen if getattr(e, "node", None) == "cloud" and 10 < e.at < 20]
    assert {e.type for e in quiet} == {"dispatched", "returned", "node_down"}
    assert any(isinstance(e, Claimed) and e.node == "cloud" and e.at > 20 for e in simulation.seen)
    boots = [e.info.boot for e in simulation.seen if isinstance(e, NodeUp) and e.info.name == "cloud"]
    assert boots == ["cloud.1", "cloud.2"]


def test_a_task_that_loses_its_node_three_times_fails() -> None:
    losses = [{"kind": "loss", "nodes": ["cloud"], "start": t, "end": t + 7} for t in (12, 24, 36)]
    service = PAPER.service[0].model_dump() | {
        "output": {"kind": "constant", "value": 512},  # half a minute of decoding
        "deadline": {"kind": "constant", "value": 1000},
    }
    node = PAPER.node[-1].model_dump() | {"time": 3.0}
    raw = PAPER.model_dump() | {"node": [node], "service": [service], "tasks": 40}
    run = Simulation(Scenario.model_validate(raw | {"fault": losses}), "cloud-only", load=2.0, seed=1).run()
    assert run.failed == 8  # those that held the slots each time
    assert run.tasks == 40


def test_a_slowed_node_takes_that_much_longer() -> None:
    def mean_step(scenario: Scenario) -> float:
        simulation = Simulation(scenario, "cloud-only", load=0.02, seed=1)  # one sequence at a time
        simulation.run()
        counters = simulation.nodes["cloud"].engine.counters()
        return counters.busy / counters.steps

    slow = mean_step(faulty({"kind": "slow", "nodes": ["cloud"], "factor": 3, "start": 0, "end": 1e6}))
    assert slow / mean_step(small()) == pytest.approx(3, rel=0.1)


def test_rotating_slowdowns_take_turns() -> None:
    fault = {"kind": "rotate", "nodes": ["edge-1", "edge-2"], "factor": 2, "every": 10, "start": 5, "end": 40}
    simulation = Simulation(faulty(fault), "random", load=0.5, seed=1)

    def slowed(at: float) -> list[str]:
        return [
            n
            for n, node in simulation.nodes.items()
            if any(c.start <= at < c.end for c in node.step_time_factor.slowdowns)
        ]

    assert [slowed(t) for t in (4, 6, 16, 26, 39, 41)] == [[], ["edge-1"], ["edge-2"], ["edge-1"], ["edge-2"], []]


def test_a_stall_is_in_the_receipt_of_what_it_overlapped() -> None:
    fault = {"kind": "stalls", "nodes": ["cloud"], "every": 5, "lasting": 2, "start": 0, "end": 1e4}
    simulation = Watched(faulty(fault), "cloud-only", load=0.3, seed=1)
    simulation.run()
    stalls = simulation.nodes["cloud"].step_time_factor.slowdowns
    assert all(math.isinf(c.factor) for c in stalls)
    flags = Counter()
    for event in simulation.seen:
        if isinstance(event, Completed):
            r = event.receipt
            began = event.at - r.wait - r.prefill - r.decode
            assert r.stalled == any(c.start < event.at and c.end > began for c in stalls)
            flags[r.stalled] += 1
    assert flags[True] > 20
    assert flags[False] > 20


def test_wrong_boot_profiles_are_what_the_node_announces_and_not_what_it_does() -> None:
    right = Simulation(small(), "random", load=0.5, seed=1)
    wrong = Simulation(small(boot_error={"edge-1": 2.5}), "random", load=0.5, seed=1)
    right.clock.step()
    for name in ("edge-1", "edge-2"):
        a, b = (s.nodes[name].info().models[0].calibration for s in (right, wrong))
        assert b.step == pytest.approx(a.step * (2.5 if name == "edge-1" else 1))
        assert right.nodes[name].table == wrong.nodes[name].table
