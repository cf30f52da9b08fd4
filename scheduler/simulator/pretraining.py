"""Pretraining in the simulator, for policies that need more tasks to learn from than a live system can spare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from perllm.scheduler.core.policy import Policy
from perllm.scheduler.simulator.scenario import Scenario
from perllm.scheduler.simulator.simulation import Simulation


def pretrain(
    policy: Policy,
    scenario: Scenario,
    *,
    loads: Sequence[float],
    seeds: Sequence[int],
    done: Callable[[float, float], None] | None = None,
) -> dict[str, Any]:
    """Let one policy live through a simulation per seed, the loads in turn, and return its snapshot. `done` hears the
    load and the on-time share of each."""
    for i, seed in enumerate(seeds):
        load = loads[i % len(loads)]
        run = Simulation(scenario, policy, load=load, seed=seed).run()
        if done is not None:
            done(load, run.on_time)
    return policy.snapshot()
