"""Arrivals: in order, at the rate and with the lengths the scenario says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.simulation import PAPER

from perllm.scheduler.simulator.scenario import Scenario, load_scenario
from perllm.scheduler.simulator.workload import make_arrivals, mean_task


@pytest.mark.parametrize("name", ["paper", "paper-bursts", "measured", "azure-code"])
def test_arrivals_come_in_order_at_the_rate_asked_for(name: str) -> None:
    scenario = load_scenario(name).model_copy(update={"tasks": 8000})
    arrivals = make_arrivals(scenario, 10.0, 3)
    times = [a.event.at for a in arrivals]
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.15)
    assert all(a.event.deadline > a.event.at and a.output >= 1 for a in arrivals)
    prompt, output, _ = mean_task(scenario)
    assert np.mean([a.event.prompt_tokens for a in arrivals]) == pytest.approx(prompt, rel=0.06)
    assert np.mean([a.output for a in arrivals]) == pytest.approx(output, rel=0.06)


def test_bursts_are_burstier_than_poisson() -> None:
    def dispersion(name: str) -> float:
        scenario = load_scenario(name).model_copy(update={"tasks": 8000})
        times = [a.event.at for a in make_arrivals(scenario, 10.0, 3)]
        counts = np.bincount(np.array(times, dtype=int))[:-1]
        return float(counts.var() / counts.mean())

    assert dispersion("paper") == pytest.approx(1.0, abs=0.25)
    assert dispersion("paper-bursts") > 3


def test_hints_are_guesses_of_the_true_length() -> None:
    raw = PAPER.model_dump() | {"tasks": 4000}
    raw["service"][0]["hint"] = {"share": 0.5, "sigma": 0.3}
    arrivals = make_arrivals(Scenario.model_validate(raw), 10.0, 3)
    chats = [a for a in arrivals if a.event.service == "chat"]
    hinted = [a for a in chats if a.event.expected_tokens is not None]
    assert len(hinted) / len(chats) == pytest.approx(0.5, abs=0.06)
    errors = [math.log(a.event.expected_tokens / a.output) for a in hinted if 5 < a.output < 200]  # type: ignore[operator]
    assert float(np.std(errors)) == pytest.approx(0.3, abs=0.05)
    assert all(a.event.expected_tokens is None for a in arrivals if a.event.service != "chat")
