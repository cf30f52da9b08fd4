"""C1 to C4: slack 1 with everything to spare, 0 at the limit, negative beyond it."""

from __future__ import annotations

import pytest

from perllm.scheduler.csucb import constraints as c


@pytest.mark.parametrize(
    ("slack", "spare", "limit", "beyond"),
    [
        (c.deadline_slack, (0.0, 4.0), (4.0, 4.0), (5.0, 4.0)),
        (c.compute_slack, (0, 8), (8, 8), (9, 8)),
        (c.memory_slack, (0, 0, 1000), (400, 600, 1000), (500, 600, 1000)),
        (c.bandwidth_slack, (0, 0, 1e6, 2.0), (1e6, 1e6, 1e6, 2.0), (2e6, 1e6, 1e6, 2.0)),
    ],
)
def test_slacks(slack: object, spare: tuple[float, ...], limit: tuple[float, ...], beyond: tuple[float, ...]) -> None:
    assert callable(slack)
    assert slack(*spare) == pytest.approx(1.0)
    assert slack(*limit) == pytest.approx(0.0)
    assert slack(*beyond) < 0


def test_one_server_per_task() -> None:
    assert c.single_server_slack(0) == 1.0
    assert c.single_server_slack(1) < 0


def test_nothing_left_is_no_division_by_zero() -> None:
    assert c.deadline_slack(1.0, 0.0) < 0
    assert c.bandwidth_slack(10.0, 0.0, 1e6, 0.0) < 0
    assert c.memory_slack(1.0, 0.0, 0.0) <= 0
