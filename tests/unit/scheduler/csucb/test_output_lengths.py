"""Output lengths: histograms, shrinkage, censoring, hints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.scheduler.core.service_classes import TENANT_CLASSES
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.token_bins import BINS, EDGES, at, bin_of


def table(lengths: Lengths, service: str = "chat", prompt: int = 120, hint: int | None = None) -> np.void:
    row = lengths.row(service, prompt, hint)
    lengths.refresh()
    return lengths.table[row]


def tail(of: np.void, tokens: float) -> float:
    return float(at(of["tail"], tokens))


def draws(count: int, median: float = 60.0, sigma: float = 0.8, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return np.clip(np.rint(median * np.exp(sigma * rng.standard_normal(count))), 1, 512).astype(int).tolist()


@given(st.floats(0, 2e5))
def test_the_bins_agree_with_plain_interpolation(tokens: float) -> None:
    values = np.sqrt(EDGES)
    assert at(values, tokens) == pytest.approx(np.interp(tokens, EDGES, values), abs=1e-9)


@given(st.integers(1, 130_000))
def test_a_count_is_in_its_bin(tokens: int) -> None:
    i = bin_of(tokens)
    assert EDGES[i] < tokens <= EDGES[i + 1]


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=40))
def test_every_row_is_a_distribution(seen: list[tuple[int, bool]]) -> None:
    lengths = Lengths()
    for tokens, ended in seen:
        lengths.observe("chat", 120, tokens, ended=ended)
    row = table(lengths)
    assert row["tail"][0] == 1.0
    assert row["tail"][BINS] == 0.0
    assert np.all(np.diff(row["tail"]) <= 1e-12)
    assert np.all(np.diff(row["mean"]) >= 0)
    assert np.all(np.diff(row["moment"]) >= 0)


def test_it_learns_what_it_sees() -> None:
    lengths = Lengths()
    for tokens in draws(1500):
        lengths.observe("chat", 120, tokens, ended=True)
    row = table(lengths)
    for quantile in (20, 60, 120, 250):
        true = 0.5 * math.erfc(math.log(quantile / 60) / 0.8 / math.sqrt(2))
        assert tail(row, quantile) == pytest.approx(true, abs=0.04)
    assert row["mean"][BINS] == pytest.approx(np.mean(draws(1500)), rel=0.08)


def test_tasks_cut_at_their_deadline_count_as_longer() -> None:
    """Counting only those that ended would make every length look short."""
    rng, lengths, naive = np.random.default_rng(1), Lengths(), Lengths()
    for tokens in draws(2000):
        cut = float(rng.uniform(20, 200))
        lengths.observe("chat", 120, int(min(tokens, cut)), ended=tokens <= cut)
        if tokens <= cut:
            naive.observe("chat", 120, tokens, ended=True)
    true = 0.5 * math.erfc(math.log(100 / 60) / 0.8 / math.sqrt(2))
    assert tail(table(lengths), 100) == pytest.approx(true, abs=0.05)
    assert tail(table(naive), 100) < true - 0.08


def test_a_cell_leans_on_its_class_and_the_class_on_the_prior() -> None:
    lengths = Lengths()
    unknown = tail(table(lengths, "new"), 50)
    assert 0.3 < unknown < 0.8
    for _ in range(200):
        lengths.observe("short", 100, 5, ended=True)
    assert tail(table(lengths, "short", prompt=4000), 50) < 0.05  # a size never seen, of a class well known
    assert tail(table(lengths, "new"), 50) == unknown


def test_prompt_sizes_are_told_apart() -> None:
    lengths, blind = Lengths(), Lengths(by_size=False)
    for one in (lengths, blind):
        for _ in range(150):
            one.observe("chat", 50, 10, ended=True)
            one.observe("chat", 1000, 300, ended=True)
    assert tail(table(lengths, prompt=50), 100) < 0.1
    assert tail(table(lengths, prompt=1000), 100) > 0.9
    assert 0.3 < tail(table(blind, prompt=50), 100) < 0.7


def test_old_observations_fade() -> None:
    lengths = Lengths()
    for _ in range(1000):
        lengths.observe("chat", 120, 300, ended=True)
    for _ in range(1500):
        lengths.observe("chat", 120, 10, ended=True)
    assert tail(table(lengths), 100) < 0.15


def with_hints(sigma: float, *, true: bool) -> Lengths:
    """Hints off by `sigma` in the logarithm, or (not true) drawn without regard to the length."""
    rng, lengths = np.random.default_rng(2), Lengths()
    for tokens in draws(1500):
        about = tokens if true else 60
        hint = max(1, round(about * math.exp(sigma * rng.standard_normal())))
        lengths.observe("chat", 120, tokens, ended=True, hint=hint)
    return lengths


def test_a_good_hint_is_believed_a_poor_one_a_little_and_an_empty_one_not_at_all() -> None:
    def mean(lengths: Lengths, hint: int | None) -> float:
        return float(table(lengths, hint=hint)["mean"][BINS])

    good, poor, empty = with_hints(0.2, true=True), with_hints(1.0, true=True), with_hints(0.5, true=False)
    assert mean(good, 300) == pytest.approx(300, rel=0.25)
    assert mean(good, 10) == pytest.approx(10, rel=0.4)
    plain = mean(poor, None)
    assert plain < mean(poor, 300) < 0.7 * 300
    assert mean(empty, 300) == pytest.approx(mean(empty, None), rel=0.15)


def test_learning_before_anybody_asks_is_harmless() -> None:
    lengths = Lengths()
    lengths.observe("chat", 120, 10, ended=True)
    lengths.refresh()
    assert tail(table(lengths), 300) < 0.1


def test_hints_can_be_ignored() -> None:
    lengths = Lengths(use_hints=False)
    assert lengths.row("chat", 100, 5) == lengths.row("chat", 100, 500) == lengths.row("chat", 100)


def test_without_spread_only_the_mean_is_left() -> None:
    lengths = Lengths(spread=False)
    for tokens in draws(500):
        lengths.observe("chat", 120, tokens, ended=True)
    row = table(lengths)
    mean = float(np.mean(draws(500)))
    assert tail(row, 0.7 * mean) == 1.0
    assert tail(row, 1.4 * mean) == 0.0


def test_a_producer_of_ever_new_classes_loses_its_own_and_nobody_elses() -> None:
    lengths = Lengths()
    for _ in range(200):
        lengths.observe("chat", 100, 10, ended=True, tenant="other")
    learned = lengths.table[_row(lengths, "chat", "other")].copy()
    for i in range(3000):
        lengths.observe(f"class-{i}", 100, 10, ended=True, tenant="hostile")
        lengths.row(f"class-{i}", 100, None, "hostile")
    lengths.refresh()
    assert np.array_equal(lengths.table[_row(lengths, "chat", "other")], learned)
    kept = [name for tenant, name, _ in lengths.snapshot() if tenant == "hostile"]
    assert kept == [f"class-{i}" for i in range(3000 - TENANT_CLASSES, 3000)]
    assert len(json.dumps(lengths.snapshot())) < 1000 * (TENANT_CLASSES + 1)
    prior = lengths.table[_row(lengths, "never", "nobody")]
    assert np.array_equal(lengths.table[_row(lengths, "class-0", "hostile")], prior)  # what goes is forgotten


def _row(lengths: Lengths, service: str, tenant: str) -> int:
    row = lengths.row(service, 100, None, tenant)
    lengths.refresh()
    return row


def test_a_tenant_learns_nothing_of_anothers_class_of_the_same_name() -> None:
    lengths = Lengths()
    before = lengths.table[_row(lengths, "chat", "b")].copy()
    for _ in range(200):
        lengths.observe("chat", 100, 500, ended=True, tenant="a")
    assert np.array_equal(lengths.table[_row(lengths, "chat", "b")], before)


def test_hints_of_every_kind_do_not_fill_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perllm.scheduler.csucb.output_lengths.MAX_TENANT_ROWS", 100)
    lengths = Lengths()
    rows = {lengths.row(f"c{n % 7}", 1 << n % 20, n, "hostile") for n in range(1, 5000)}
    assert len(rows) == 101  # beyond, all share the prior's
    lengths.refresh()
    general = lengths.row("more", 100, 7, "hostile")
    assert general in rows
    assert lengths.row("chat", 100, None, "other") not in rows
    assert np.array_equal(lengths.table[general], lengths.table[_row(lengths, "never", "nobody")])
    lengths.forget()
    assert lengths.row("c1", 100, 7, "hostile") == 0


def test_snapshot_round_trip_is_exact() -> None:
    lengths = with_hints(0.3, true=True)
    again = Lengths()
    again.restore(json.loads(json.dumps(lengths.snapshot())))
    assert again.snapshot() == lengths.snapshot()
    for hint in (None, 40):
        assert np.array_equal(table(again, hint=hint), table(lengths, hint=hint))
