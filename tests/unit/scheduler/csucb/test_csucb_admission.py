"""Urgency, and what a placement is worth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.scheduler.csucb.admission import ENERGY_SHARE, review, urgency, worth

positive = st.floats(1e-3, 1e6)


@given(positive, positive, st.integers(0, 10**7), st.floats(0, 1e4))
def test_urgency_is_a_share_and_grows_as_time_runs_out(left: float, ample: float, backlog: int, rate: float) -> None:
    now = urgency(left, ample, backlog, rate)
    assert 0 < now <= 1
    assert urgency(left / 2, ample, backlog, rate) >= now
    assert urgency(left, ample, 2 * backlog, rate) >= now


def test_a_day_leaves_patience_and_a_backlog_takes_it() -> None:
    assert urgency(86_400, 20.0, 0, 10.0) < 0.001
    assert urgency(86_400, 20.0, 1_000_000, 10.0) == 1.0
    assert urgency(4.0, 20.0, 0, 10.0) == 1.0


PLAIN = {"own": 6.0, "lost": 0.0, "slot_cost": 0.0, "energy": 0.5, "least": 0.0, "urgency": 1.0, "most": 6.0}


def test_harm_slot_cost_and_energy_stand_against_the_value() -> None:
    assert worth(**PLAIN) == pytest.approx(5.5)
    assert worth(**PLAIN | {"lost": 5.0, "slot_cost": 1.0}) == pytest.approx(-0.5)


def test_energy_that_must_be_paid_anyway_counts_by_the_risk_of_waiting() -> None:
    patient = PLAIN | {"own": 0.6, "urgency": 0.1}
    assert worth(**patient | {"least": 0.5}) == pytest.approx(0.6 - 0.1 * 0.5)
    assert worth(**patient | {"energy": 3.0, "least": 0.5}) < 0


def test_energy_alone_does_not_refuse_what_would_be_on_time() -> None:
    assert worth(**PLAIN | {"energy": 1e4}) == pytest.approx(6.0 * (1 - ENERGY_SHARE))
    assert worth(**PLAIN | {"own": 0.6, "energy": 1e4}) < 0


@given(st.floats(1e-3, 1e4), st.floats(1e-3, 1.0))
def test_a_long_task_is_not_put_off_for_being_long(energy: float, risk: float) -> None:
    """Where it costs least already, and is sure to be on time, waiting gains it nothing."""
    assert worth(**PLAIN | {"own": 6.0 * risk, "energy": energy, "least": energy, "urgency": risk}) > 0


def test_reviews_come_closer_as_the_deadline_does() -> None:
    assert review(10.0, 100.0) > review(10.0, 1.0) > 10.0
