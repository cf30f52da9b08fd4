"""What a second of a node's busy time usually costs others."""

from __future__ import annotations

import json

import pytest

from perllm.scheduler.csucb.usual_costs import STAYS, UsualCosts, note


def test_it_is_a_mean_over_time_not_over_looks() -> None:
    costs = UsualCosts()
    row = costs.row("n")
    for second in range(1, 60):
        note(costs.rows[row], 1.0, 1.0, float(second))
    for _ in range(1000):  # a moment in which everybody looks
        note(costs.rows[row], 100.0, 1.0, 59.0)
    assert costs.rows[row]["cost"] == pytest.approx(1.0)


def test_it_follows_within_some_stays_of_a_task() -> None:
    slow, quick = UsualCosts(), UsualCosts()
    for costs, stay in ((slow, 10.0), (quick, 0.1)):
        note(costs.rows[costs.row("n")], 1.0, stay, 1.0)
        note(costs.rows[costs.row("n")], 3.0, stay, 1.0 + STAYS)
    assert quick.rows[0]["cost"] == pytest.approx(3.0, rel=1e-3)
    assert 1.0 < slow.rows[0]["cost"] < 1.5


def test_it_is_kept_over_a_restart_for_any_number_of_nodes() -> None:
    costs = UsualCosts()
    for i in range(100):
        row = costs.row(f"n{i}")
        note(costs.rows[row], 0.5 * i, 1.0, 1.0 + i)
    copy = UsualCosts.restored(json.loads(json.dumps(costs.snapshot())))
    assert copy.snapshot() == costs.snapshot()
    assert copy.rows[copy.row("n70")]["cost"] == 35.0


def test_a_foreign_state_is_refused() -> None:
    for bad in ({"n": [1.0]}, {"n": ["x", 0.0]}):
        with pytest.raises(ValueError, match=r"not enough values|could not convert"):
            UsualCosts.restored(bad)
