"""The oracles' rollouts, against what then happens."""

from __future__ import annotations

import numpy as np
import pytest
from support.simulation import PAPER

from perllm.broker.errors import BadSetting
from perllm.scheduler.policies import make_policy
from perllm.scheduler.simulator import oracles
from perllm.scheduler.simulator.oracles import Foresight, Informed
from perllm.scheduler.simulator.rollout import rollout
from perllm.scheduler.simulator.scenario import Scenario, load_scenario
from perllm.scheduler.simulator.simulation import Simulation


def quiet(name: str, tasks: int) -> Scenario:
    """One node without noise, its link as announced, and tasks that have up to 20 s."""
    node = next(n for n in PAPER.node if n.name == name).model_dump() | {"noise": 0.0, "drift": 0.0}
    node["link"]["fluctuation"] = 0.0
    services = [s.model_dump() | {"deadline": {"kind": "uniform", "low": 1, "high": 20}} for s in PAPER.service]
    return Scenario.model_validate(PAPER.model_dump() | {"node": [node], "service": services, "tasks": tasks})


@pytest.mark.parametrize("name", ["edge-1", "cloud"])
@pytest.mark.parametrize("moment", [0.05, 0.4, 1.5])
def test_what_foresight_rolls_out_is_what_happens(name: str, moment: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "STEP_TIME_MARGIN", 1.0)
    simulation = Simulation(quiet(name, 16), "random", load=3000.0, seed=3, mechanisms=True)
    simulation.core._queue_beyond_slots = None  # all of them are on the node before anything has happened
    while simulation.clock.now < moment:
        simulation.clock.step()
    (node,) = simulation.core.cluster.nodes.values()
    (sim,) = simulation.nodes.values()
    oracle, now = Foresight(simulation), simulation.clock.now
    value, joules = rollout(len(node.in_flight), oracle.attempts(node, None, now), oracle.node_now(node, now))
    before = sim.engine.counters().energy - sim.table.idle_watts * simulation.clock.now
    in_flight = set(node.in_flight)
    assert len(in_flight) > 5
    simulation.run()
    after = sim.engine.counters().energy - sim.table.idle_watts * simulation.clock.now
    happened = sum(simulation.outcomes[i].on_time for i in in_flight)
    assert happened > 0
    assert value == pytest.approx(happened, abs=1)
    assert joules == pytest.approx(after - before, rel=0.15)


def test_informed_lengths_are_those_longer_than_what_was_generated() -> None:
    simulation = Simulation(PAPER.model_copy(update={"tasks": 50}), "informed", load=0.5, seed=1)
    oracle = Informed(simulation)
    truth = simulation.true_lengths()
    chat = next(a.event.id for a in simulation.arrivals if a.event.service == "chat")
    for generated in (0, 40, 200):
        drawn = oracle.lengths(chat, generated)
        assert drawn.min() > generated
        assert (drawn == oracle.lengths(chat, generated)).all()
        longer = truth["chat"][truth["chat"] > generated]
        assert np.log(drawn).mean() == pytest.approx(np.log(longer).mean(), rel=0.05)
    assert (oracle.lengths(chat, 10_000) == 10_001).all()


def test_foresight_refuses_what_cannot_be_in_time_and_keeps_what_can() -> None:
    run = Simulation(PAPER.model_copy(update={"tasks": 400}), "foresight", load=0.3, seed=2).run()
    assert run.on_time > 0.9
    assert run.rejected > 0
    assert run.late + run.expired < 0.06 * 400


@pytest.mark.parametrize("name", ["foresight", "informed"])
def test_nothing_has_a_slot_on_a_node_that_is_lost(name: str) -> None:
    lossy = load_scenario("node-loss")
    (loss,) = lossy.fault
    early = loss.model_copy(update={"start": 5.0, "end": 25.0, "nodes": ("cloud", "edge-1")})
    scenario = lossy.model_copy(update={"fault": (early,), "tasks": 300})
    assert Simulation(scenario, name, load=0.9, seed=0).run().tasks == 300


def test_an_oracle_lives_in_a_simulation_only() -> None:
    with pytest.raises(BadSetting, match="no 'foresight'"):
        make_policy("foresight")
