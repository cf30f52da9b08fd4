"""The figures of runs."""

from __future__ import annotations

import pytest

from perllm.scheduler.simulator.result import effective_capacity


def test_effective_capacity_lies_where_the_curve_crosses() -> None:
    assert effective_capacity([(0.3, 0.9), (0.5, 0.85), (0.7, 0.75)]) == pytest.approx(0.6)
    assert effective_capacity([(0.3, 0.9), (0.5, 0.85)]) == 0.5
    assert effective_capacity([(0.5, 0.6)]) == pytest.approx(0.25)
    assert effective_capacity([(0.3, 0.9), (0.5, 0.7), (0.7, 0.82)]) == 0.7
