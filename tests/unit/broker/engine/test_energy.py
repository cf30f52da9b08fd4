"""The split of a meter over requests: what is charged, and that nothing is lost or made up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.engine.energy import Attribution
from perllm.broker.messages import Energy


@dataclass
class Trace:
    """A recorded meter: a true power over time, of which only a counter that moves every `tick` s can be read."""

    idle: float = 10.0
    active: float = 50.0
    resolution: float = 0.0
    tick: float = 0.0
    method: str = "nvml"
    estimated: bool = False
    now: float = 0.0
    joules: float = 0.0
    shown: float = 0.0  # what the counter says
    ticks: int = 0

    def pass_time(self, seconds: float, watts: float) -> None:
        end = self.now + seconds
        while self.tick and (self.ticks + 1) * self.tick <= end:
            self.ticks += 1
            self.joules += (self.ticks * self.tick - self.now) * watts
            self.now, self.shown = self.ticks * self.tick, self.joules
        self.joules += (end - self.now) * watts
        self.now = end

    def read(self) -> float:
        return self.shown if self.tick else self.joules


def attribution(meter: Trace, window: float = 0.1) -> Attribution:
    return Attribution(meter, window, clock=lambda: meter.now)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "work", "leave", "wait"]),
        st.integers(0, 4),
        st.floats(0, 0.3),  # s until the next event
        st.floats(0, 300),  # W in that time
        st.just(0.0) | st.floats(1e-6, 5),  # work, s: no step takes less than a microsecond
    ),
    max_size=60,
)


@given(EVENTS, st.sampled_from([(0.0, 0.0), (0.1, 0.02), (0.1, 0.1), (0.5, 0.05)]), st.sampled_from([0.0, 0.1, 1.0]))
def test_shares_and_unattributed_sum_to_the_meter(
    events: list[tuple[str, int, float, float, float]], meter_kind: tuple[float, float], window: float
) -> None:
    resolution, tick = meter_kind
    meter = Trace(resolution=resolution, tick=tick)
    split = attribution(meter, window)
    inside: set[int] = set()
    shares: list[Energy] = []
    for kind, key, seconds, watts, work in events:
        if kind == "enter" and key not in inside:
            split.enter(key)
            inside.add(key)
        elif kind == "leave" and key in inside:
            shares.append(split.leave(key))
            inside.remove(key)
        elif kind == "work" and key in inside:
            split.work({key: work})
        meter.pass_time(seconds, watts)
    shares += [split.leave(key) for key in inside]
    total = split.settle()
    assert total == pytest.approx(meter.read())
    assert sum(share.total for share in shares) + split.unattributed == pytest.approx(total, abs=1e-6)
    assert all(share.inference >= 0 and share.idle >= 0 for share in shares)


def test_next_to_no_work_costs_next_to_nothing() -> None:
    meter = Trace(resolution=0.1)
    split = attribution(meter)
    split.enter("a")
    meter.pass_time(1, 60)
    split.work({"a": 5e-324})
    split.enter("b")
    meter.pass_time(0.01, 60)
    assert split.leave("b").inference == 0  # it had no part in any step


def test_work_decides_the_active_part_and_presence_the_idle_part() -> None:
    meter = Trace(idle=10)
    split = attribution(meter)
    split.enter("short")
    split.enter("long")
    meter.pass_time(1, 60)
    split.work({"short": 1, "long": 4})
    short = split.leave("short")
    meter.pass_time(1, 60)
    split.work({"long": 5})
    long = split.leave("long")
    assert short.inference == pytest.approx(50 * 1 / 5)
    assert short.idle == pytest.approx(10 / 2)
    assert long.inference == pytest.approx(50 * 4 / 5 + 50)
    assert long.idle == pytest.approx(10 / 2 + 10)


def test_an_idle_spell_is_nobodys() -> None:
    meter = Trace(idle=10)
    split = attribution(meter)
    meter.pass_time(3600, 25)  # something else works on the machine
    split.enter("a")
    meter.pass_time(1, 40)
    split.work({"a": 1})
    assert split.leave("a").total == pytest.approx(40)
    assert split.unattributed == pytest.approx(3600 * 25)


def test_present_without_work_pays_idle_only() -> None:
    meter = Trace(idle=10)
    split = attribution(meter)
    split.enter("waits")
    split.enter("works")
    meter.pass_time(1, 110)
    split.work({"works": 1})
    waits, works = split.leave("waits"), split.leave("works")
    assert (waits.inference, waits.idle) == (0, pytest.approx(5))
    assert works.total == pytest.approx(105)


def test_a_receipt_is_final_before_a_coarse_counter_moves() -> None:
    """Requests shorter than the counter's tick: each is charged about its due at once, and the sum still holds."""
    meter = Trace(idle=100, active=400, resolution=0.1, tick=0.1)
    split = attribution(meter)
    shares = []
    for i in range(100):
        split.enter(i)
        meter.pass_time(0.03, 500)
        split.work({i: 1})
        shares.append(split.leave(i))
        meter.pass_time(0.005, 100)
    total = split.settle()
    assert sum(share.total for share in shares) + split.unattributed == pytest.approx(total)
    due = 0.03 * 500
    assert sum(share.total for share in shares) == pytest.approx(100 * due, rel=0.15)
    for share in shares[10:]:
        assert share.total == pytest.approx(due, rel=0.6)


def test_an_advance_too_high_is_taken_off_what_follows() -> None:
    meter = Trace(idle=0, active=1000, resolution=1.0)
    split = attribution(meter)
    split.enter("first")
    meter.pass_time(0.1, 100)
    split.work({"first": 1})
    assert split.leave("first").inference == pytest.approx(100)  # at the power expected, not the 100 W it was
    assert split.unattributed < 0
    split.enter("second")
    meter.pass_time(2, 100)
    split.work({"second": 1})
    assert split.leave("second").inference == pytest.approx(210 - 100)


def test_the_same_request_cannot_enter_twice() -> None:
    split = attribution(Trace())
    split.enter("a")
    with pytest.raises(ValueError, match="'a' is in the batch already"):
        split.enter("a")


def test_method_and_estimate_are_the_meters() -> None:
    split = attribution(Trace(method="rapl", estimated=False))
    split.enter("a")
    share = split.leave("a")
    assert (share.method, share.estimated) == ("rapl", False)
