"""What the simulator's tests share."""

from __future__ import annotations

from functools import cache
from typing import Any

from perllm.broker.messages import Event
from perllm.scheduler.simulator.capacity import capacity
from perllm.scheduler.simulator.scenario import Scenario, load_scenario
from perllm.scheduler.simulator.simulation import Simulation
from perllm.scheduler.simulator.speed_changes import PiecewiseConstant, Slowdown

PAPER = load_scenario("paper")


def small(scenario: Scenario = PAPER, **changes: Any) -> Scenario:
    return scenario.model_copy(update={"tasks": 300, **changes})


def rate_at(scenario: Scenario, load: float) -> float:
    """Tasks/s that come at this load."""
    return load * sum(capacity(scenario).values())


def constant(value: float, *slowdowns: Slowdown) -> PiecewiseConstant:
    """The same value always, but for the slowdowns."""

    class Constant(PiecewiseConstant):
        def _more(self) -> list[float]:
            return [value] * 256

    return Constant(1.0, slowdowns, 0.0)


class Watched(Simulation):
    """Keeps the event stream."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.seen: list[Event] = []
        super().__init__(*args, **more, listen=self.seen.append)


@cache
def recorded_events() -> tuple[Event, ...]:
    """The event stream of a busy run of 120 tasks."""
    simulation = Watched(small(tasks=120, start=1000.0), "round-robin+mech", load=1.2, seed=2)
    simulation.run()
    return tuple(simulation.seen)
