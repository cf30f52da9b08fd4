"""The index and the scale of energy."""

from __future__ import annotations

import pytest

from perllm.scheduler.csucb.index import SCALE_FACTOR, EnergyScale, index


def test_the_index() -> None:
    assert index(6.0, 0.9, 0.1, 50.0, 100.0, 0.3) == pytest.approx(6 * 0.8 - 0.5 - 0.3)


def test_the_scale_follows_the_energy_of_tasks() -> None:
    scale = EnergyScale()
    scale.suggest(400.0)
    scale.suggest(9.0)  # only the first counts
    assert scale.joules == pytest.approx(SCALE_FACTOR * 400)
    for _ in range(500):
        scale.observe(3.0)
    assert scale.joules == pytest.approx(SCALE_FACTOR * 3.0, rel=0.01)


def test_without_any_energy_it_does_not_count() -> None:
    scale = EnergyScale()
    scale.observe(0.0)
    assert index(6.0, 0.5, 0.0, 1000.0, scale.joules, 0.0) == pytest.approx(3.0)
