"""The bandwidth estimate."""

from __future__ import annotations

import random

import pytest

from perllm.scheduler.csucb.bandwidth import SMALL_PAYLOAD, Bandwidth


def test_it_follows_a_collapse_and_back() -> None:
    link = Bandwidth.prior(12.5e6)
    for rate in (12.5e6, 0.4e6, 12.5e6):
        for _ in range(15):
            link.learn(300_000, 300_000 / rate)
        assert link.rate == pytest.approx(rate, rel=0.05)


def test_small_payloads_of_one_size_teach_the_latency_and_not_the_rate() -> None:
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
    assert Bandwidth.restored(link.snapshot()) == link
    assert Bandwidth.restored({"log_rate": 1.0, "latency": 0.5}) == Bandwidth(1.0, 0.5)


@pytest.mark.parametrize(("rate", "latency"), [(2e4, 0.001), (1e5, 0.005), (1e6, 0.002)])
def test_small_payloads_of_many_sizes_teach_the_rate(rate: float, latency: float) -> None:
    link, rng = Bandwidth.prior(12.5e6), random.Random(7)
    for _ in range(80):
        size = rng.randint(200, SMALL_PAYLOAD - 1)
        link.learn(size, (latency + size / rate) * rng.gauss(1.0, 0.1))
    assert link.rate == pytest.approx(rate, rel=0.25)
    assert link.latency + 4_000 / link.rate == pytest.approx(latency + 4_000 / rate, rel=0.35)


@pytest.mark.parametrize("jitter", [0.1, 1.0])
def test_chance_teaches_no_rate(jitter: float) -> None:
    for seed in range(20):
        link, rng = Bandwidth.prior(12.5e6), random.Random(seed)
        for _ in range(300):
            size = rng.randint(200, 8_000)
            link.learn(size, 0.001 * rng.lognormvariate(0.0, jitter) + size / 12.5e6)
        assert 2e6 < link.rate < 1e8


def test_a_few_small_payloads_prove_nothing_and_a_large_one_has_the_last_word() -> None:
    link = Bandwidth.prior(1e7)
    for size in (100, 8_000, 200, 16_000):
        link.learn(size, size / 1e5)
    assert link.rate == pytest.approx(1e7)
    for _ in range(20):
        link.learn(1_000_000, 1.0)
    assert link.rate == pytest.approx(1e6, rel=0.1)
