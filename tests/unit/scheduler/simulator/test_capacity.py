"""A scenario's capacity is what its nodes can do."""

from __future__ import annotations

import pytest
from support.simulation import PAPER, small

from perllm.scheduler.simulator.capacity import capacity
from perllm.scheduler.simulator.simulation import Simulation


@pytest.mark.parametrize("name", ["edge-1", "cloud"])
def test_a_flooded_node_works_at_its_capacity(name: str) -> None:
    node = next(n for n in PAPER.node if n.name == name)
    scenario = small(tasks=2000, node=(node,))
    (rate,) = capacity(scenario).values()
    run = Simulation(scenario, "random", load=20.0, seed=1).run()
    done = sorted(o.ended for o in run.outcomes)
    # While every slot is taken: leave out the filling and the emptying
    middle = done[int(0.9 * len(done))] - done[int(0.1 * len(done))]
    assert 0.8 * len(done) / middle == pytest.approx(rate, rel=0.1)


def test_the_cloud_alone_can_carry_what_the_paper_says() -> None:
    share = capacity(PAPER)["cloud"] / sum(capacity(PAPER).values())
    assert share == pytest.approx(1 / 2.2, rel=0.02)
