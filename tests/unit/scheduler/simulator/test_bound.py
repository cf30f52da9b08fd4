"""The yardsticks: nothing exceeds the bound, and clairvoyant is behind nobody it bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.simulation import PAPER

from perllm.scheduler.simulator import clairvoyant as search
from perllm.scheduler.simulator.bound import Bound, bound
from perllm.scheduler.simulator.clairvoyant import Frontier, clairvoyant, total_joules
from perllm.scheduler.simulator.result import RunResult
from perllm.scheduler.simulator.scenario import Scenario
from perllm.scheduler.simulator.simulation import Simulation

POLICIES = ("cs-ucb", "round-robin", "earliest-completion+mech", "cloud-only+mech", "foresight")
PROFILES = (
    "llamacpp-0.3.36_xeon-spr_llama-8b-q4_0",
    "vllm-0.25.1_h200_llama-33b-bf16",
    "vllm-0.25.1_h200_llama-8b-bf16",
)


def random_scenario(seed: int) -> tuple[Scenario, float]:
    """A scenario of any kind, and a load."""
    rng = np.random.default_rng(seed)

    def between(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    nodes: list[dict[str, Any]] = []
    for i in range(int(rng.integers(1, 4))):
        context = int(between(1024, 8192))
        node = {
            "name": f"n{i}",
            "tier": "cloud" if i == 0 else "edge",
            "profile": PROFILES[int(rng.integers(len(PROFILES)))],
            "time": between(0.1, 1.5),
            "idle_watts": 15,
            "active_watts": 60,
            "slots": int(rng.choice([1, 2, 8, 16])),
            "context": context,
            "kv_tokens": int(context * between(1, 8)),
            "chunk": int(rng.choice([16, 64, 512, 2048])),
            "noise": float(rng.choice([0.0, 0.05, 0.4])),
            "drift": float(rng.choice([0.0, 0.1])),
            "link": {
                "bandwidth": between(1e5, 1e8),
                "fluctuation": 0.3,
                "joules_per_byte": 1e-6 * int(rng.integers(2)),
            },
        }
        nodes.append(node)
    services = [
        {
            "name": f"s{i}",
            "share": 1,
            "prompt": {"kind": "lognormal", "median": between(20, 2000), "sigma": 0.7, "most": 9000},
            "output": {"kind": "pareto", "least": between(1, 80), "alpha": 1.3, "most": 900},
            "deadline": {"kind": "uniform", "low": 0.5, "high": between(1, 120)},
            "max_tokens": int(between(16, 1000)),
            "value": between(0.2, 5),
        }
        for i in range(int(rng.integers(1, 3)))
    ]
    kinds: list[dict[str, Any]] = [
        {"kind": "slow", "factor": between(0.3, 4)},
        {"kind": "narrow", "factor": between(0.03, 1)},
        {"kind": "stalls", "every": 4.0, "lasting": 1.0},
        {"kind": "loss"},
    ]
    faults = [kinds[int(rng.integers(4))] | {"nodes": ["n0"], "start": 1.0, "end": 9.0}] if rng.random() < 0.6 else []
    given = {"title": f"random {seed}", "tasks": 50, "node": nodes, "service": services, "fault": faults}
    return Scenario.model_validate(given), between(0.2, 3.0)


def run(scenario: Scenario, policy: str, load: float, seed: int) -> tuple[RunResult, Bound]:
    """A run and the bound on it."""
    simulation = Simulation(scenario, policy, load=load, seed=seed)
    result = simulation.run()
    return result, bound(scenario, list(simulation.nodes.values()), simulation.arrivals)


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_exceeds_the_bound(seed: int) -> None:
    scenario, load = random_scenario(seed)
    for policy in POLICIES:
        result, limit = run(scenario, policy, load, seed)
        assert result.on_time_value <= limit.share * (1 + 1e-9)
        assert total_joules(result) >= limit.least_joules(result.on_time_value) * (1 - 1e-9)


def lonely(name: str, **service: Any) -> Scenario:
    """One of `paper`'s nodes with one slot and no noise, and tasks that are all alike."""
    node = next(n for n in PAPER.node if n.name == name).model_dump() | {"noise": 0.0, "drift": 0.0, "slots": 1}
    given = {"name": "one", "share": 1, "max_tokens": 200}
    given |= {key: {"kind": "constant", "value": value} for key, value in service.items()}
    return Scenario.model_validate({"title": "one", "tasks": 150, "node": [node], "service": [given]})


@pytest.mark.parametrize("name", ["edge-1", "cloud"])
def test_the_bound_is_near_where_nothing_can_be_shared(name: str) -> None:
    """More work than time: what one long task after the other takes is known."""
    result, limit = run(lonely(name, prompt=64, output=200, deadline=30), "earliest-completion+mech", 1.5, 1)
    assert result.on_time_value < 0.9
    assert 0.95 < result.on_time_value / limit.share <= 1.0
    assert 0.9 < limit.least_joules(result.on_time_value) / total_joules(result) <= 1.0


@pytest.mark.parametrize("seed", range(200, 203))
def test_a_task_alone_is_possible_just_when_it_is(seed: int) -> None:
    """Its deadline a hair after what it takes, or well before."""
    scenario, _ = random_scenario(seed)
    for node in scenario.node:
        for noise in (0.0, node.noise):
            alone = node.model_copy(update={"noise": noise, "drift": node.drift if noise else 0.0})
            for prompt, output in ((7, 1), (100, 30), (900, 200)):
                given = {"prompt": prompt, "output": output, "payload": 20_000}
                services = lonely("cloud", **given, deadline=1e4).service
                quiet = scenario.model_copy(update={"node": (alone,), "service": services, "tasks": 1, "fault": ()})
                (outcome,) = run(quiet, "round-robin", 1.0, seed)[0].outcomes
                if not outcome.on_time:
                    continue  # its context does not fit
                took = outcome.ended - outcome.submitted
                for factor, least, most in ((1.0001, 1.0, 1.0), (0.6, 0.0, 0.0)):
                    services = lonely("cloud", **given, deadline=took * factor).service
                    result, limit = run(quiet.model_copy(update={"service": services}), "round-robin", 1.0, seed)
                    assert result.on_time_value == least
                    if noise == 0.0 or most:
                        assert limit.share == pytest.approx(most, abs=1e-5)


@pytest.mark.parametrize("seed", [100, 101, 103])
def test_clairvoyant_is_never_behind_who_it_bounds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_SHAKES", 2)
    scenario, load = random_scenario(seed)
    rivals = POLICIES[:-1]
    frontier = clairvoyant(scenario, load=load, seed=seed, rivals=rivals)
    for policy in rivals:
        result, _ = run(scenario, policy, load, seed)
        assert result.on_time_value <= frontier.best.on_time_value
        assert frontier.least_joules(result.on_time_value) <= total_joules(result) * (1 + 1e-9)
    simulation = Simulation(scenario, "cs-ucb", load=load, seed=seed)
    simulation.run()
    limit = bound(scenario, list(simulation.nodes.values()), simulation.arrivals)
    for known in frontier.runs:
        assert known.on_time_value <= limit.share * (1 + 1e-9)
        assert total_joules(known) >= limit.least_joules(known.on_time_value) * (1 - 1e-9)


def test_a_frontier_says_what_a_share_costs() -> None:
    result, _ = run(PAPER.model_copy(update={"tasks": 60}), "cs-ucb", 0.5, 0)
    share, joules = result.on_time_value, total_joules(result)
    frontier = Frontier((result,))
    assert frontier.least_joules(share) == pytest.approx(joules)
    assert frontier.least_joules(share / 2) == pytest.approx(joules / 2)
    assert np.isnan(frontier.least_joules(1.01))
