"""Many simulations: every policy at every load with every seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product

from scheduler.policies import make_policy
from scheduler.simulator.oracles import ORACLES
from scheduler.simulator.result import Run
from scheduler.simulator.run import Simulation, capacity
from scheduler.simulator.scenario import Scenario
from scheduler.simulator.workload import make_arrivals


@dataclass(frozen=True, slots=True)
class Point:
    """One simulation to do."""

    policy: str
    load: float
    seed: int


def points(policies: Sequence[str], loads: Sequence[float], seeds: Sequence[int]) -> list[Point]:
    """All combinations, seeds outermost, so that an interrupted sweep has all policies for the seeds it reached."""
    return [Point(policy, load, seed) for seed, load, policy in product(seeds, loads, policies)]


def check(scenario: Scenario, policies: Sequence[str]) -> None:
    """Raise BadSetting for what would stop a run: a policy, profile or trace that is not there."""
    capacity(scenario)
    make_arrivals(scenario.model_copy(update={"tasks": 1}), 1.0, 0)
    for name in policies:
        if name not in ORACLES:
            make_policy(name)


def simulate_one(scenario: Scenario, point: Point) -> Run:
    """Run one point."""
    return Simulation(scenario, point.policy, load=point.load, seed=point.seed).run()


def sweep(
    scenario: Scenario, todo: Sequence[Point], *, jobs: int = 1, done: Callable[[Run], None] | None = None
) -> list[Run]:
    """Run all points on `jobs` processes and return their runs in the order of `todo`; `done` hears of each as it
    ends. After Ctrl-C, returns those that had ended."""
    finished: dict[Point, Run] = {}
    runs = _here(scenario, todo) if jobs == 1 else _spread(scenario, todo, jobs)
    try:
        for point, run in runs:
            finished[point] = run
            if done is not None:
                done(run)
    except KeyboardInterrupt:
        pass
    return [finished[point] for point in todo if point in finished]


def _here(scenario: Scenario, todo: Sequence[Point]) -> Iterator[tuple[Point, Run]]:
    for point in todo:
        yield point, simulate_one(scenario, point)


def _spread(scenario: Scenario, todo: Sequence[Point], jobs: int) -> Iterator[tuple[Point, Run]]:
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(simulate_one, scenario, point): point for point in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
