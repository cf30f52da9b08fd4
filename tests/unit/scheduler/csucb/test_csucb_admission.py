"""What waiting is worth, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.scheduler.csucb.admission import (
    DRAIN_MARGIN,
    ENERGY_SHARE,
    TIME_KEPT,
    counted_energy,
    review,
    time_after_waiting,
    worth_now,
    worth_of_waiting,
)

positive = st.floats(1e-3, 1e6)


@given(positive, st.integers(0, 10**7), st.floats(0, 1e4))
def test_who_waits_counts_on_a_part_of_the_time_less_what_the_backlog_takes(
    left: float, backlog: int, rate: float
) -> None:
    after = time_after_waiting(left, float(backlog), rate)
    assert after <= TIME_KEPT * left
    assert time_after_waiting(left / 2, float(backlog), rate) <= after
    assert time_after_waiting(left, 2.0 * backlog, rate) <= after
    if rate > 0:
        assert time_after_waiting(left, float(backlog), 2 * rate) >= after


def test_a_day_is_time_to_wait_and_a_backlog_takes_it() -> None:
    assert time_after_waiting(86_400.0, 0.0, 10.0) == TIME_KEPT * 86_400.0
    assert time_after_waiting(86_400.0, 1_000_000.0, 10.0) < 0
    assert time_after_waiting(4.0, 3.0, 10.0) == TIME_KEPT * 4.0 - DRAIN_MARGIN * 0.3


@given(positive, positive)
def test_a_long_task_is_not_put_off_for_being_long(least: float, most: float) -> None:
    """What it costs anywhere weighs at most a share of its value; what is half as dear again, half as much again."""
    counted = counted_energy(least, most)
    assert counted * least <= ENERGY_SHARE * most * (1 + 1e-9)
    assert counted == 1.0 or counted * least == pytest.approx(ENERGY_SHARE * most)


def test_what_others_lose_and_energy_stand_against_the_value() -> None:
    assert worth_of_waiting(4.0, 0.5, 2.0) == 2.5
    assert worth_now(4.0, 0.5, 3.0, 4.0) == pytest.approx(0.54)
    assert worth_now(4.0, 3.0, 3.0, 4.0) < 0


def test_of_equals_now_is_better() -> None:
    assert worth_now(4.0, 0.5, worth_of_waiting(4.0, 0.5, 0.0), 4.0) > 0


def test_energy_alone_does_not_refuse_what_would_be_on_time_and_cannot_wait() -> None:
    assert worth_now(4.0, 1e4, 0.0, 4.0) == 2.0
    assert worth_now(1.0, 1e4, 0.0, 4.0) < 0


def test_reviews_come_closer_as_the_deadline_does() -> None:
    assert review(10.0, 100.0) > review(10.0, 1.0) > 10.0
