"""A shared link: every byte arrives, shares are equal, and changes take effect at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulation import constant

from perllm.scheduler.simulator.clock import Clock
from perllm.scheduler.simulator.link import SharedLink
from perllm.scheduler.simulator.speed_changes import Slowdown


def test_transfers_share_a_link_equally() -> None:
    clock, ends = Clock(), {}
    link = SharedLink(clock, constant(1e-6))

    def send(name: str, size: float) -> None:
        link.send(size, lambda: ends.update({name: clock.now}))

    send("a", 2e6)
    clock.at(1.0, lambda: send("b", 2e6))
    clock.at(1.5, lambda: send("c", 0.25e6))
    while clock.step():
        pass
    # a: 1 s alone, 0.5 s at half, 0.75 s at a third (c comes and goes), the rest at half; then b alone
    assert ends == pytest.approx({"c": 2.25, "a": 3.25, "b": 4.25})


def test_a_narrowed_link_is_slower_from_that_moment() -> None:
    clock, ends = Clock(), []
    link = SharedLink(clock, constant(1e-6, Slowdown(1.0, 3.0, 4.0)))
    link.send(2e6, lambda: ends.append(clock.now))
    while clock.step():
        pass
    assert ends == pytest.approx([3.5])


def test_a_cancelled_transfer_gives_its_share_back_and_never_arrives() -> None:
    clock, ends = Clock(), []
    link = SharedLink(clock, constant(1e-6))
    first = link.send(3e6, lambda: ends.append("first"))
    link.send(1e6, lambda: ends.append(clock.now))
    clock.at(1.0, lambda: link.cancel(first))
    while clock.step():
        pass
    assert ends == pytest.approx([1.5])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(1, 5e6)), min_size=1, max_size=15))
def test_a_link_moves_every_byte_and_is_never_idle_with_work(transfers: list[tuple[float, float]]) -> None:
    clock, ends = Clock(), []
    link = SharedLink(clock, constant(1e-6))
    for at, size in transfers:
        clock.at(at, lambda size=size: link.send(size, lambda: ends.append(clock.now)))
    while clock.step():
        pass
    assert len(ends) == len(transfers)
    busy_until = 0.0
    for at, size in sorted(transfers):  # work conservation: the last end is that of any order of service
        busy_until = max(busy_until, at) + size * 1e-6
    assert max(ends) == pytest.approx(busy_until)
