"""Output lengths from the text: learned, never much worse than the histogram, bounded, apart by tenant, kept."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perllm.broker.text_features import Sketch, parse, sketch
from perllm.scheduler.core.cluster import Demand, Task
from perllm.scheduler.csucb.output_lengths import MAX_TENANT_ROWS, MAX_TEXTS, TEXT_ROWS, Lengths
from perllm.scheduler.csucb.text_model import SHARE, START
from perllm.scheduler.csucb.token_bins import BINS, EDGES, at, bin_of

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima"]


def text_of(prompt: str, tenant: str = "default") -> Sketch:
    return parse(sketch([prompt], tenant))


def filler(rng: random.Random, count: int = 20) -> str:
    return " ".join(rng.choices(WORDS, k=count)) + f" {rng.random()}"


def tail(lengths: Lengths, prompt: str, tokens: float, tenant: str = "default") -> float:
    row = lengths.row("chat", 50, None, tenant, text=text_of(prompt, tenant))
    lengths.refresh()
    return float(at(lengths.table[row]["tail"], tokens))


def read(lengths: Lengths, prompt: str, codes_of: str, hint: int | None = None, tenant: str = "default") -> np.void:
    """The row for a prompt, sketched as the tenant `codes_of` does."""
    row = lengths.row("chat", 50, hint, tenant, text=text_of(prompt, codes_of))
    lengths.refresh()
    return lengths.table[row]


def teach(lengths: Lengths, prompt: str, tokens: int, *, ended: bool = True, tenant: str = "default") -> None:
    lengths.observe("chat", 50, tokens, ended=ended, tenant=tenant, text=text_of(prompt, tenant))


def taught(rounds: int = 300, seed: int = 0, *, tenant: str = "default") -> Lengths:
    """Stories are long, verdicts short, whatever else stands there."""
    rng, lengths = random.Random(seed), Lengths()
    for _ in range(rounds):
        teach(lengths, f"Write a story: {filler(rng)}", round(400 * rng.lognormvariate(0, 0.3)), tenant=tenant)
        teach(lengths, f"Give a verdict: {filler(rng)}", round(8 * rng.lognormvariate(0, 0.3)), tenant=tenant)
    return lengths


def test_what_is_asked_says_how_long_it_gets_also_where_much_else_changes() -> None:
    lengths = taught()
    rng = random.Random(99)
    for _ in range(20):
        assert tail(lengths, f"Write a story: {filler(rng)}", 100) > 0.9
        assert tail(lengths, f"Give a verdict: {filler(rng)}", 100) < 0.1
    blind = lengths.row("chat", 50)
    lengths.refresh()
    assert 0.4 < at(lengths.table[blind]["tail"], 100) < 0.6


def test_a_prompt_seen_before_is_known_almost_exactly() -> None:
    rng, lengths = random.Random(1), Lengths()
    known = {f"Explain {filler(rng)}": rng.randrange(20, 800) for _ in range(60)}
    for _ in range(5):
        for prompt, tokens in known.items():
            teach(lengths, prompt, tokens)
    for prompt, tokens in known.items():
        assert tail(lengths, prompt, 0.85 * tokens) > 0.8
        assert tail(lengths, prompt, 1.15 * tokens) < 0.2


def test_it_is_right_about_how_sure_it_is() -> None:
    """Of two kinds of prompts whose answers are as long in the middle, one's vary much more."""
    rng, lengths = random.Random(2), Lengths()
    spread = {"sure": 0.1, "vague": 1.0}
    for _ in range(1500):
        kind = rng.choice(list(spread))
        teach(lengths, f"{kind} {filler(rng, 6)}", max(1, round(100 * rng.lognormvariate(0, spread[kind]))))
    for kind, sigma in spread.items():
        true = 0.5 * math.erfc(math.log(1.5) / sigma / math.sqrt(2))
        assert tail(lengths, f"{kind} {filler(rng, 6)}", 150) == pytest.approx(true, abs=0.07)


def test_tasks_cut_count_as_longer() -> None:
    rng, lengths, naive = random.Random(3), Lengths(), Lengths()
    for _ in range(1500):
        prompt, tokens, cut = filler(rng, 6), round(60 * rng.lognormvariate(0, 0.6)), rng.randrange(20, 120)
        teach(lengths, prompt, min(tokens, cut), ended=tokens <= cut)
        if tokens <= cut:
            teach(naive, prompt, tokens)
    true = 0.5 * math.erfc(math.log(100 / 60) / 0.6 / math.sqrt(2))
    assert np.mean([tail(lengths, filler(rng, 6), 100) for _ in range(30)]) == pytest.approx(true, abs=0.07)
    assert np.mean([tail(naive, filler(rng, 6), 100) for _ in range(30)]) < true - 0.1


def test_what_has_changed_is_learned_anew() -> None:
    rng, lengths = random.Random(4), taught(400)
    for _ in range(60):
        teach(lengths, f"Write a story: {filler(rng)}", 100)
    assert np.mean([tail(lengths, f"Write a story: {filler(rng)}", 200) for _ in range(10)]) < 0.35


# --- never much worse than the histogram


def log_losses(lengths: Lengths, tasks: list[tuple[str, int, int | None]]) -> float:
    total = 0.0
    for prompt, tokens, hint in tasks:
        row = lengths.row("chat", 50, hint, text=text_of(prompt))
        # what is believed now, however little was learned since the row was filled
        lengths.forget()
        row = lengths.row("chat", 50, hint, text=text_of(prompt))
        lengths.refresh()
        i = bin_of(float(tokens))
        believed = lengths.table[row]["tail"]
        total -= math.log(max(float(believed[i] - believed[i + 1]), 1e-300))
        lengths.observe("chat", 50, tokens, ended=True, hint=hint, text=text_of(prompt))
    return total


def regret_bound(tasks: int) -> float:
    return math.log(1 / START[0]) + tasks * math.log(1 / (1 - SHARE))


_TASKS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "a b", "b a c", "c"]), st.sampled_from([1, 2, 7, 60, 64, 500, 4000, 30_000])),
    min_size=1,
    max_size=120,
)


@settings(max_examples=40, deadline=None)
@given(_TASKS)
def test_no_sequence_makes_it_worse_than_the_histogram_by_more_than_the_bound(tasks: list[tuple[str, int]]) -> None:
    plain = [(p, t, None) for p, t in tasks]
    assert log_losses(Lengths(), plain) <= log_losses(Lengths(use_text=False), plain) + regret_bound(len(plain)) + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_nor_does_one_made_to_mislead_it(seed: int) -> None:
    """As soon as the text has something to go by, it is turned into its opposite; hints lie too."""
    rng, tasks = random.Random(seed), []
    for n in range(600):
        word = rng.choice(("story", "verdict"))
        long = (word == "story") == (n // 60 % 2 == 0)
        tokens = 600 if long else 6
        tasks.append((f"Write a {word}", tokens, rng.choice((None, 6, 600))))
    mixed, histogram = log_losses(Lengths(), tasks), log_losses(Lengths(use_text=False), tasks)
    assert mixed <= histogram + regret_bound(len(tasks)) + 1e-6


# --- tenants, bounds, snapshots


def test_a_tenant_learns_nothing_of_anothers_texts() -> None:
    lengths, alone = taught(100, tenant="a"), Lengths()
    for one in (lengths, alone):
        teach(one, "Write a story: now", 50, tenant="b")
    prompt = "Write a story: " + " ".join(WORDS)
    for codes_of in ("b", "a"):  # its own codes, and a's sent in b's name
        mine, expected = (read(one, prompt, codes_of, tenant="b") for one in (lengths, alone))
        assert np.array_equal(mine, expected)


def test_texts_of_ever_new_tenants_and_prompts_take_bounded_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, lengths = random.Random(5), Lengths()
    for n in range(MAX_TEXTS + 40):
        teach(lengths, filler(rng), 30, tenant=f"t{n}")
    assert [tenant for tenant, _ in lengths.snapshot_texts()] == [f"t{n}" for n in range(40, MAX_TEXTS + 40)]
    lengths = Lengths()
    for _ in range(3000):
        teach(lengths, filler(rng), rng.randrange(1, 3000))
    assert len(json.dumps(lengths.snapshot_texts())) < 500_000


def test_rows_for_texts_leave_room_for_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perllm.scheduler.csucb.output_lengths.MAX_TENANT_ROWS", 100)
    rng, lengths = random.Random(6), Lengths()
    for _ in range(400):
        teach(lengths, filler(rng), rng.randrange(1, 3000))
    rows = {lengths.row("chat", 50, hint, text=text_of(filler(rng))) for hint in range(1, 2000)}
    assert len(rows) <= 100 + 1
    general = lengths.row("another", 50)
    lengths.refresh()
    assert lengths.table[general]["tail"][0] == 1.0
    assert MAX_TENANT_ROWS * TEXT_ROWS < MAX_TENANT_ROWS


def test_a_prompt_that_came_again_outlasts_many_that_did_not() -> None:
    rng, lengths = random.Random(7), Lengths()
    for _ in range(20):
        teach(lengths, "the one that comes again", 123)
    for _ in range(4000):
        teach(lengths, filler(rng), rng.choice((5, 900)))
    assert tail(lengths, "the one that comes again", 105) > 0.7
    assert tail(lengths, "the one that comes again", 145) < 0.3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=40), st.integers(0, 5000), st.booleans()), max_size=30))
def test_every_row_is_a_distribution_and_a_snapshot_gives_the_same(seen: list[tuple[str, int, bool]]) -> None:
    lengths, again = Lengths(), Lengths()
    for prompt, tokens, ended in seen:
        teach(lengths, prompt, tokens, ended=ended)
    lengths.forget()
    again.restore(*json.loads(json.dumps([lengths.snapshot(), lengths.snapshot_texts()])))
    assert again.snapshot() == lengths.snapshot()
    assert again.snapshot_texts() == lengths.snapshot_texts()
    for prompt, tokens, _ in [*seen, ("new", 1, True)]:
        for one in (lengths, again):
            one.observe("chat", 50, tokens, ended=True, text=text_of(prompt), hint=7)
        rows = [read(one, prompt, "default", 9) for one in (lengths, again)]
        row = rows[0]
        assert np.array_equal(*rows)
        assert row["tail"][0] == 1.0
        assert row["tail"][BINS] == 0.0
        assert np.all(np.diff(row["tail"]) <= 1e-12)


@pytest.mark.parametrize(
    "spoilt", [{}, {"codes": "x"}, {"codes": "//8=", "weights": "AAAA", "slots": "", "digests": ""}]
)
def test_a_foreign_snapshot_is_refused_and_changes_nothing(spoilt: dict[str, str]) -> None:
    lengths = taught(20)
    before = lengths.snapshot_texts()
    with pytest.raises((ValueError, KeyError)):
        lengths.restore(lengths.snapshot(), [["default", spoilt]])
    assert lengths.snapshot_texts() == before


def test_it_says_what_it_goes_by() -> None:
    lengths = taught()

    def forecast(prompt: str) -> tuple[str, float, list[int]]:
        task = Task("x", 0.0, 9.0, 1.0, "chat", Demand(), 50, 100, 1, text=text_of(prompt))
        found = lengths.forecast(task)
        return found.source, found.median, [i.code for i in found.because if i.factor > 1]

    source, median, longer = forecast("Write a story: of the sea")
    assert source == "text"
    assert 200 < median < 800
    assert set(longer) & set(np.frombuffer(text_of("write a story")[8:], "<u2").tolist())
    for _ in range(40):
        teach(lengths, "again", 77)
    source, median, _ = forecast("again")
    assert source == "prompt"
    assert EDGES[bin_of(77.0)] <= median <= EDGES[bin_of(77.0) + 1] * 1.1
