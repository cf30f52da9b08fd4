"""The bandwidth estimate."""

from __future__ import annotations

import pytest

from perllm.scheduler.csucb.bandwidth import Bandwidth


def test_it_follows_a_collapse_and_back() -> None:
    link = Bandwidth.prior(12.5e6)
    for rate in (12.5e6, 0.4e6, 12.5e6):
        for _ in range(15):
            link.learn(300_000, 300_000 / rate)
        assert link.rate == pytest.approx(rate, rel=0.05)


def test_small_payloads_teach_the_latency_and_not_the_rate() -> None:
    link = Bandwidth.prior(12.5e6)
    for _ in range(30):
        link.learn(500, 0.002)
    assert link.rate == pytest.approx(12.5e6)
    assert link.latency == pytest.approx(0.002, rel=0.05)


def test_ups_and_downs_weigh_alike() -> None:
    link = Bandwidth.prior(1e7)
    link.learn(100_000, 100_000 / 2e7)
    link.learn(100_000, 100_000 / 0.5e7)
    assert 0.7e7 < link.rate < 1.1e7


def test_no_time_at_all_is_no_sample() -> None:
    link = Bandwidth.prior(1e7)
    link.learn(100_000, 0.0)
    assert link.rate == pytest.approx(1e7)
    assert Bandwidth(**link.snapshot()) == link
