"""`clairvoyant`: the best schedules known for one simulation, found with all of it known in advance.

It is a portfolio and a local search, and no optimum: schedules start as runs of `foresight` at several weights of
value against energy and of the policies they shall bound (`rivals`), and are then improved, each step by a whole
simulation whose result counts as it is:

- *prune*: the same placements at the same times, but for the tasks that were late, which are refused at once;
- *fill*: a pruned schedule as it is, and what it left out placed by `foresight` where that is worth it;
- *shake*: the same after some of its placements, drawn at random, were taken out.

So it is never behind a rival, on the same arrivals, nodes and faults: in on-time value, nor in energy at its on-time
value. How far it is from the best possible, `bound` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perllm.broker.messages import Dispatched, Event
from perllm.scheduler.policies import has_mechanisms
from perllm.scheduler.simulator.oracles import Plan
from perllm.scheduler.simulator.result import RunResult
from perllm.scheduler.simulator.scenario import Scenario
from perllm.scheduler.simulator.simulation import Simulation
from perllm.scheduler.simulator.workload import Arrival

#: Its name among policies.
NAME = "clairvoyant"
#: `foresight` as the search begins: its options.
_STARTS: tuple[Mapping[str, float], ...] = (
    {"value_weight": 5.0},
    {"value_weight": 12.0},
    {"value_weight": 100.0},
    {"value_weight": 25.0, "patience": 0.5},
)
#: Weights of value with which a schedule is filled.
_FILLS = (8.0, 100.0)
#: Rounds of fill and prune, and the schedules each begins with.
_ROUNDS, _BREADTH = 1, 4
#: Shakes at the end, and the share of placements each takes out.
_SHAKES, _SHAKEN = 6, 0.15
#: Policies without foresight it starts from, where the caller names none.
RIVALS = ("cs-ucb", "earliest-completion+mech")


@dataclass(frozen=True, slots=True)
class _Schedule:
    """One simulated schedule: its result, and the placements of the tasks that were on time."""

    run: RunResult
    plan: Plan
    mechanisms: bool

    @property
    def joules(self) -> float:
        """J in all, idle power apart."""
        return total_joules(self.run)


@dataclass(frozen=True, slots=True)
class Frontier:
    """Schedules of which none is better than another in on-time value and in energy; the least value first."""

    runs: tuple[RunResult, ...]

    @property
    def best(self) -> RunResult:
        """The run with the most on-time value."""
        return self.runs[-1]

    def least_joules(self, share: float) -> float:
        """J in all at this on-time share of the value: between two schedules by their mixture. NaN beyond the best."""
        if share > self.best.on_time_value + 1e-12:
            return float("nan")
        points = [(0.0, 0.0), *((run.on_time_value, total_joules(run)) for run in self.runs)]
        hull: list[tuple[float, float]] = []
        for x, y in points:
            while len(hull) >= 2 and _above(hull[-2], hull[-1], (x, y)):
                hull.pop()
            hull.append((x, y))
        return float(np.interp(share, [x for x, _ in hull], [y for _, y in hull]))


def total_joules(run: RunResult) -> float:
    """J the run has spent in all, idle power apart; 0 where no task was on time."""
    good = round(run.on_time * run.tasks)
    return run.joules * good if good else 0.0


def clairvoyant(
    scenario: Scenario,
    *,
    load: float,
    seed: int,
    rivals: Sequence[str] = RIVALS,
    arrivals: list[Arrival] | None = None,
) -> Frontier:
    """Search for the frontier of one simulation. `arrivals` replace the scenario's."""
    search = _Search(scenario, load, seed, arrivals)
    for options in _STARTS:
        search.simulate("foresight", options)
    for name in rivals:
        search.simulate(name)
    for known in list(search.found):
        search.prune(known)
    for _ in range(_ROUNDS):
        for known in search.frontier()[-_BREADTH:]:
            for weight in _FILLS:
                search.fill(known, weight)
    rng = np.random.default_rng([seed, 3])
    for i in range(_SHAKES):
        best = search.frontier()
        search.shake(best[-1 - i % min(2, len(best))], rng)
    runs = tuple(replace(known.run, policy=NAME) for known in search.frontier())
    return Frontier(runs)


class _Search:
    """The schedules found so far."""

    def __init__(self, scenario: Scenario, load: float, seed: int, arrivals: list[Arrival] | None) -> None:
        self._scenario, self._load, self._seed, self._arrivals = scenario, load, seed, arrivals
        self.found: list[_Schedule] = []
        self._filled: set[tuple[int, float]] = set()

    def simulate(self, policy: str, options: Mapping[str, Any] | None = None, *, mechanisms: bool = True) -> _Schedule:
        """Run it, and keep what came of it."""
        placed: Plan = {}

        def listen(event: Event) -> None:
            if isinstance(event, Dispatched):
                placed[event.id] = (event.at, event.node)

        simulation = Simulation(
            self._scenario,
            policy,
            load=self._load,
            seed=self._seed,
            mechanisms=mechanisms and has_mechanisms(policy),
            arrivals=self._arrivals,
            listen=listen,
            options=options,
        )
        for at, _ in (options or {}).get("plan", {}).values():
            simulation.decide_at(at)
        run = simulation.run()
        plan = {i: placed[i] for i, outcome in simulation.outcomes.items() if outcome.on_time}
        self.found.append(_Schedule(run, plan, mechanisms and has_mechanisms(policy)))
        return self.found[-1]

    def prune(self, known: _Schedule) -> None:
        self.simulate("foresight", {"plan": known.plan, "only_plan": True}, mechanisms=known.mechanisms)

    def fill(self, known: _Schedule, weight: float) -> None:
        if not known.mechanisms or (id(known.plan), weight) in self._filled:
            return
        self._filled.add((id(known.plan), weight))
        self.prune(self.simulate("foresight", {"plan": known.plan, "value_weight": weight}))

    def shake(self, known: _Schedule, rng: np.random.Generator) -> None:
        if known.mechanisms:
            kept = rng.random(len(known.plan)) >= _SHAKEN
            plan = {i: at for (i, at), keep in zip(known.plan.items(), kept, strict=True) if keep}
            self.prune(self.simulate("foresight", {"plan": plan, "value_weight": _FILLS[-1]}))

    def frontier(self) -> list[_Schedule]:
        """Those no other is better than, the least value first."""
        best: list[_Schedule] = []
        for known in sorted(self.found, key=lambda s: (-s.run.on_time_value, s.joules)):
            if not best or known.joules < best[-1].joules:
                best.append(known)
        return best[::-1]


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b is on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
