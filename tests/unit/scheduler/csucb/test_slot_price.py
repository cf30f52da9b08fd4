"""The slot price."""

from __future__ import annotations

import pytest

from perllm.scheduler.csucb.slot_price import MAX_PRICE, TARGET, SlotPrice


def after(taken: float, urgent: float, seconds: int, begin: float = 0.0) -> SlotPrice:
    price = SlotPrice(price=begin)
    for i in range(seconds):
        price.watch(float(i + 1), taken, urgent)
    return price


def test_it_rises_under_overload_and_falls_after_it() -> None:
    assert after(1.25, 0.5, 10).price > 0.2
    assert after(0.2, 0.5, 30, begin=1.0).price == 0.0
    assert after(1.25, 0.5, 10_000).price == MAX_PRICE


def test_room_is_kept_only_where_urgent_work_comes() -> None:
    taken = (TARGET + 1.0) / 2
    assert after(taken, 0.5, 30).price > 0
    assert after(taken, 0.0, 30).price == 0


def test_silence_is_not_overload() -> None:
    price = SlotPrice(at=0.0)
    price.watch(3600.0, 1.25, 0.5)
    assert price.price < 0.1


def test_the_price_is_per_mean_stay_and_value() -> None:
    price = SlotPrice(price=1.0)
    assert price.per_second(6.0, 1.0) == 0.0  # nothing known yet
    for _ in range(200):
        price.stayed(2.0)
    assert price.per_second(6.0, 1.0) == pytest.approx(3.0)
    assert SlotPrice(**price.snapshot()) == price


def test_what_an_overload_left_of_the_price_is_not_asked_on_an_idle_node() -> None:
    price = SlotPrice(price=3.0, stay=2.0)
    assert price.per_second(6.0, 0.0) == 0.0
    assert price.per_second(6.0, 0.4) < price.per_second(6.0, 0.8) == price.per_second(6.0, 2.0)
