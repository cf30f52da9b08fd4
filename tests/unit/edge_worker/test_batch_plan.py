"""The batch's decisions: shares of a prefill budget, widths of decodes, whom to preempt, which cells are taken."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from perllm.edge_worker.batch_plan import OLDEST_SHARE, Widths, choose_victim, share_inputs, share_prefill
from perllm.edge_worker.kv_cells import KVCells
from perllm.edge_worker.prefix_cache import common_prefix


@given(st.lists(st.integers(1, 3000), max_size=20), st.integers(1, 512))
def test_prefill_uses_the_budget_and_starves_nobody(remaining: list[int], budget: int) -> None:
    given_ = share_prefill(remaining, budget)
    assert all(0 <= g <= r for g, r in zip(given_, remaining, strict=True))
    assert sum(given_) == min(budget, sum(remaining))
    if remaining:
        assert given_[0] >= min(remaining[0], max(1, int(budget * OLDEST_SHARE)))


def test_a_short_prompt_is_done_at_once_beside_a_long_one() -> None:
    assert share_prefill([2000, 30], 100) == [70, 30]


def test_among_equals_the_older_goes_first() -> None:
    assert share_prefill([50, 50, 50], 100) == [50, 50, 0]


INPUTS = st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=20), min_size=1, max_size=8)


@given(INPUTS, st.integers(1, 512), st.integers(1, 64))
def test_a_step_takes_whole_inputs_within_its_budget_and_starves_nobody(
    lengths: list[list[int]], budget: int, most: int
) -> None:
    taken = share_inputs(lengths, [sum(each) for each in lengths], budget, most)
    tokens = [sum(each[:count]) for each, count in zip(lengths, taken, strict=True)]
    assert taken[0] >= 1
    assert sum(taken) <= most
    assert sum(tokens) <= max(budget, lengths[0][0])
    if sum(taken) < most:  # what is left out did not fit
        assert all(
            count == len(each) or sum(tokens) + each[count] > budget for each, count in zip(lengths, taken, strict=True)
        )


def test_a_single_text_is_embedded_beside_thousands() -> None:
    assert share_inputs([[50] * 100, [40]], [5000, 40], 200, 128) == [3, 1]


COSTS = st.dictionaries(st.integers(2, 16), st.floats(0.1, 100), max_size=8)
#: Measured, ms: SmolLM2 Q8_0 with AVX-512. Narrow batches cost more than one after another, wide ones less.
Q8_0 = {1: 5.7, 2: 24.3, 3: 30.3, 4: 34.5, 6: 45.0, 8: 42.7, 12: 50.2, 16: 49.5}


@given(COSTS, st.floats(0.1, 100), st.integers(1, 16), st.lists(st.tuples(st.integers(1, 16), st.floats(0, 100))))
def test_widths_always_serve_everyone(
    cost: dict[int, float], one: float, widest: int, steps: list[tuple[int, float]]
) -> None:
    widths = Widths(cost | {1: one}, widest)
    for n, seconds in [(n, s) for n, s in steps if n <= widest] + [(n, 1.0) for n in range(1, widest + 1)]:
        chosen = widths.choose(n)
        assert sum(chosen) == n
        assert all(chosen)
        widths.observe(chosen, seconds)


def test_before_anything_was_seen_calibration_decides() -> None:
    widths = Widths(Q8_0, 16)
    assert widths.choose(2) == (1, 1)
    assert widths.choose(4) == (1, 1, 1, 1)
    assert widths.choose(16) == (16,)
    batching_pays = Widths({1: 10.0, 2: 11.0, 4: 13.0, 8: 17.0}, 8)
    assert [batching_pays.choose(n) for n in range(1, 9)] == [(n,) for n in range(1, 9)]


def play(widths: Widths, n: int, true: dict[int, float], steps: int) -> float:
    """The mean time of a step on a machine where decodes truly take so long."""
    total = 0.0
    for _ in range(steps):
        chosen = widths.choose(n)
        seconds = sum(true[width] for width in chosen)
        widths.observe(chosen, seconds)
        total += seconds
    return total / steps


def test_what_is_seen_corrects_a_calibration_that_was_disturbed() -> None:
    disturbed = Q8_0 | {1: 12.0}  # something else ran while single decodes were measured
    widths = Widths(disturbed, 16)
    assert widths.choose(3) == (3,)
    true = Q8_0 | {5: 40.0, 7: 43.0}
    assert play(widths, 3, true, 500) < 1.1 * 3 * true[1]


def test_it_follows_a_change_of_the_machine() -> None:
    widths = Widths(Q8_0, 8)
    assert play(widths, 4, Q8_0, 200) < 1.05 * 4 * Q8_0[1]
    slowed = Q8_0 | {1: 20.0}
    assert play(widths, 4, slowed, 500) < 1.1 * slowed[4]


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 1000)), min_size=1))
def test_the_victim_has_the_least_value_per_work(worth: list[tuple[float, int]]) -> None:
    value, work = worth[choose_victim(worth)]
    assert all(value / work <= v / w for v, w in worth)


def test_of_equals_the_youngest_goes() -> None:
    assert choose_victim([(1.0, 10), (1.0, 10), (2.0, 10)]) == 1


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    want = 0
    while want < min(len(a), len(b)) and a[want] == b[want]:
        want += 1
    assert common_prefix(a, b) == want


class CellsMachine(RuleBasedStateMachine):
    """KVCells beside a model that gives every token a name and asks who holds it."""

    SIZE, LIVE = 40, 4
    live = Bundle("live")
    kept = Bundle("kept")

    def __init__(self) -> None:
        super().__init__()
        self.size = self.SIZE
        self.cells = KVCells(self.SIZE, self.LIVE)
        self.model: dict[int, list[int]] = {}
        self.names = 0
        self.ids = list(range(self.LIVE))
        self.kept_ids = list(range(self.LIVE, 2 * self.LIVE))

    def used(self) -> set[int]:
        return {name for held in self.model.values() for name in held}

    @precondition(lambda self: self.ids)
    @rule(target=live)
    def enter(self) -> int:
        sequence = self.ids.pop()
        self.model[sequence] = []
        return sequence

    @rule(sequence=live, count=st.integers(1, 15))
    def grow(self, sequence: int, count: int) -> None:
        if count > self.size - len(self.used()):
            try:
                self.cells.grow(sequence, count)
            except IndexError:
                return
            raise AssertionError("took cells that are not free")
        self.cells.grow(sequence, count)
        self.model[sequence] += range(self.names, self.names + count)
        self.names += count

    @rule(free=st.integers(0, 40))
    def correct(self, free: int) -> None:
        self.size = min(self.size, len(self.used()) + free)
        self.cells.correct(free)

    @rule(source=live, into=live, count=st.integers(0, 20))
    def share(self, source: int, into: int, count: int) -> None:
        if source == into or self.model[into] or not self.model[source]:
            return
        self.cells.share(source, into, count)
        self.model[into] = self.model[source][:count]

    @rule(source=live, into=live)
    def fork(self, source: int, into: int) -> None:
        if not self.model[into]:
            self.share(source, into, len(self.model[source]))

    @precondition(lambda self: self.kept_ids)
    @rule(target=kept, source=live, count=st.integers(1, 20))
    def remember(self, source: int, count: int) -> int:
        sequence = self.kept_ids.pop()
        if self.model[source]:
            self.cells.share(source, sequence, count)
        self.model[sequence] = self.model[source][:count]
        return sequence

    @rule(source=kept, into=live, count=st.integers(1, 20))
    def reuse(self, source: int, into: int, count: int) -> None:
        if self.model[into] or not self.model[source]:
            return
        self.cells.share(source, into, count)
        self.model[into] = self.model[source][:count]

    @rule(sequence=consumes(live))
    def leave(self, sequence: int) -> None:
        self.cells.drop(sequence)
        del self.model[sequence]
        self.ids.append(sequence)

    @rule(sequence=consumes(kept))
    def forget(self, sequence: int) -> None:
        self.cells.drop(sequence)
        del self.model[sequence]
        self.kept_ids.append(sequence)

    @invariant()
    def counts_agree(self) -> None:
        live = {name for s, held in self.model.items() if s < self.LIVE for name in held}
        assert self.cells.free == self.size - len(self.used())
        assert self.cells.reusable == len(self.used() - live)
        assert all(self.cells.length(s) == len(held) for s, held in self.model.items())


TestCells = CellsMachine.TestCase
TestCells.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
