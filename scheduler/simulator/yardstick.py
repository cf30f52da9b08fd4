"""How good policies are at one load with one seed: beside the best schedules known, and the bound on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perllm.scheduler.simulator.bound import Bound, bound, noise_of
from perllm.scheduler.simulator.clairvoyant import clairvoyant, total_joules
from perllm.scheduler.simulator.result import RunResult
from perllm.scheduler.simulator.scenario import Scenario
from perllm.scheduler.simulator.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy's run. Shares are of the value of all tasks, energies J in all, idle power apart; ratios are the
    policy's over the reference's, energies at the policy's own on-time share."""

    policy: str
    on_time: float  # of all tasks
    share: float
    joules: float
    of_clairvoyant: float  # on-time share
    of_bound: float
    joules_of_clairvoyant: float
    joules_of_bound: float


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What was measured. `frontier`: (share, J) of clairvoyant's schedules."""

    policies: tuple[Measured, ...]
    clairvoyant: Measured
    frontier: tuple[tuple[float, float], ...]
    bound_share: float


def measure(scenario: Scenario, policies: Sequence[str], *, load: float, seed: int) -> Yardstick:
    """Run the policies, search for what could have been done, and bound it. Raises BadSetting."""
    bounds: dict[bytes, Bound] = {}
    runs: list[tuple[RunResult, Bound]] = []
    for name in policies:
        simulation = Simulation(scenario, name, load=load, seed=seed)
        run = simulation.run()
        given = scenario, list(simulation.nodes.values()), simulation.arrivals
        noise = noise_of(*given)
        if noise not in bounds:
            bounds[noise] = bound(*given)
        runs.append((run, bounds[noise]))
    frontier = clairvoyant(scenario, load=load, seed=seed, rivals=policies)
    best, limit = frontier.best, runs[0][1]

    def measured(run: RunResult, limit: Bound) -> Measured:
        share, joules = run.on_time_value, total_joules(run)
        return Measured(
            policy=run.policy,
            on_time=run.on_time,
            share=share,
            joules=joules,
            of_clairvoyant=_ratio(share, best.on_time_value),
            of_bound=_ratio(share, limit.share),
            joules_of_clairvoyant=_ratio(joules, frontier.least_joules(share)),
            joules_of_bound=_ratio(joules, limit.least_joules(share)),
        )

    return Yardstick(
        policies=tuple(measured(run, its) for run, its in runs),
        clairvoyant=measured(best, limit),
        frontier=tuple((run.on_time_value, total_joules(run)) for run in frontier.runs),
        bound_share=limit.share,
    )


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else float("nan")
