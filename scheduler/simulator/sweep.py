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
from perllm.scheduler.simulator.oracles import ORACLES
from perllm.scheduler.simulator.result import Run
from perllm.scheduler.simulator.run import Simulation, capacity
from perllm.scheduler.simulator.scenario import Scenario
from perllm.scheduler.simulator.trace import stretched
from perllm.scheduler.simulator.workload import Arrival, make_arrivals


@dataclass(frozen=True, slots=True)
class Point:
    """One simulation to do. `options` are the policy's own keywords, as pairs; `abort` as in `Simulation`."""

    policy: str
    load: float
    seed: int
    options: tuple[tuple[str, Any], ...] = ()
    abort: bool | None = None


def points(policies: Sequence[str], loads: Sequence[float], seeds: Sequence[int]) -> list[Point]:
    """All combinations, seeds outermost, so that an interrupted sweep has all policies for the seeds it reached."""
    return [Point(policy, load, seed) for seed, load, policy in product(seeds, loads, policies)]


def check(scenario: Scenario, policies: Sequence[str]) -> None:
    """Raise BadSetting for what would stop a run: a policy, profile or trace that is not there."""
    capacity(scenario)
    make_arrivals(scenario.model_copy(update={"tasks": 1}), 1.0, 0)
    for name in policies:
        if name not in ORACLES:
            try:
                make_policy(name)
            except BadSetting as error:
                raise BadSetting(f"{error}; in simulations also {', '.join(ORACLES)}") from None


def simulate_one(scenario: Scenario, point: Point, trace: Sequence[Arrival] | None = None) -> Run:
    """Run one point, of the scenario's own arrivals or of a trace's."""
    arrivals = None
    if trace is not None:
        arrivals = stretched(trace, trace_load(scenario, trace) / point.load, scenario.start)
    policy = make_policy(point.policy, point.seed, **dict(point.options)) if point.options else point.policy
    return Simulation(scenario, policy, load=point.load, seed=point.seed, abort=point.abort, arrivals=arrivals).run()


def trace_load(scenario: Scenario, trace: Sequence[Arrival]) -> float:
    """The load a trace is to the scenario's cluster as it was recorded."""
    span = max(trace[-1].event.at - trace[0].event.at, 1e-9)
    return len(trace) / span / sum(capacity(scenario).values())


def sweep(
    scenario: Scenario,
    todo: Sequence[Point],
    *,
    jobs: int = 1,
    trace: Sequence[Arrival] | None = None,
    done: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Run all points on `jobs` processes and return their runs in the order of `todo`; `done` hears of each as it
    ends. After Ctrl-C, returns those that had ended."""
    finished: dict[Point, Run] = {}
    one = partial(simulate_one, scenario, trace=trace)
    runs = ((point, one(point)) for point in todo) if jobs == 1 else _spread(one, todo, jobs)
    try:
        for point, run in runs:
            finished[point] = run
            if done is not None:
                done(run)
    except KeyboardInterrupt:
        pass
    return [finished[point] for point in todo if point in finished]


def _spread(one: Callable[[Point], Run], todo: Sequence[Point], jobs: int) -> Iterator[tuple[Point, Run]]:
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, point): point for point in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
