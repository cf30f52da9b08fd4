"""Many simulations: every policy at every load with every seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from perllm.broker.errors import BadSetting
from perllm.scheduler.policies import make_policy
from perllm.scheduler.simulator.capacity import capacity
from perllm.scheduler.simulator.clairvoyant import NAME as CLAIRVOYANT
from perllm.scheduler.simulator.clairvoyant import clairvoyant
from perllm.scheduler.simulator.oracles import ORACLES
from perllm.scheduler.simulator.result import RunResult
from perllm.scheduler.simulator.scenario import Scenario
from perllm.scheduler.simulator.simulation import Simulation
from perllm.scheduler.simulator.trace import stretched
from perllm.scheduler.simulator.workload import Arrival, make_arrivals


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One simulation to run. `options` are the policy's own keywords, as pairs; `abort` as in `Simulation`."""

    policy: str
    load: float
    seed: int
    options: tuple[tuple[str, Any], ...] = ()
    abort: bool | None = None


def run_specs(policies: Sequence[str], loads: Sequence[float], seeds: Sequence[int]) -> list[RunSpec]:
    """All combinations, seeds outermost, so that an interrupted sweep has all policies for the seeds it reached."""
    return [RunSpec(policy, load, seed) for seed, load, policy in product(seeds, loads, policies)]


def check_sweep(scenario: Scenario, policies: Sequence[str]) -> None:
    """Raise BadSetting for what would stop a run: a policy, profile or trace that is not there."""
    capacity(scenario)
    make_arrivals(scenario.model_copy(update={"tasks": 1}), 1.0, 0)
    for name in policies:
        if name not in (CLAIRVOYANT, *ORACLES):
            try:
                make_policy(name)
            except BadSetting as error:
                raise BadSetting(f"{error}; in simulations also {', '.join((CLAIRVOYANT, *ORACLES))}") from None


def simulate_one(scenario: Scenario, spec: RunSpec, trace: Sequence[Arrival] | None = None) -> RunResult:
    """Run one simulation, of the scenario's own arrivals or of a trace's."""
    arrivals = None
    if trace is not None:
        arrivals = stretched(trace, trace_load(scenario, trace) / spec.load, scenario.start)
    if spec.policy == CLAIRVOYANT:
        return clairvoyant(scenario, load=spec.load, seed=spec.seed, arrivals=arrivals).best
    return Simulation(
        scenario,
        spec.policy,
        load=spec.load,
        seed=spec.seed,
        abort=spec.abort,
        arrivals=arrivals,
        options=dict(spec.options),
    ).run()


def trace_load(scenario: Scenario, trace: Sequence[Arrival]) -> float:
    """The load a trace is to the scenario's cluster as it was recorded."""
    span = max(trace[-1].event.at - trace[0].event.at, 1e-9)
    return len(trace) / span / sum(capacity(scenario).values())


def sweep(
    scenario: Scenario,
    specs: Sequence[RunSpec],
    *,
    jobs: int = 1,
    trace: Sequence[Arrival] | None = None,
    done: Callable[[RunResult], None] | None = None,
) -> list[RunResult]:
    """Run all `specs` on `jobs` processes and return the results in their order; `done` hears of each as it
    ends. After Ctrl-C, returns those that had ended."""
    finished: dict[RunSpec, RunResult] = {}
    one = partial(simulate_one, scenario, trace=trace)
    runs = ((spec, one(spec)) for spec in specs) if jobs == 1 else _spread(one, specs, jobs)
    try:
        for spec, run in runs:
            finished[spec] = run
            if done is not None:
                done(run)
    except KeyboardInterrupt:
        pass
    return [finished[spec] for spec in specs if spec in finished]


def _spread(
    one: Callable[[RunSpec], RunResult], specs: Sequence[RunSpec], jobs: int
) -> Iterator[tuple[RunSpec, RunResult]]:
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, spec): spec for spec in specs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
