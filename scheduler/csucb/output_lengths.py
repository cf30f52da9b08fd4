"""How long outputs get: a decayed histogram per service class and prompt size, and what a producer's hint adds to it.

The distribution of a cell (class × prompt size) leans on its class while the cell has seen little, and the class on a
broad prior while the class has. A task that was cut at c tokens says only that it was longer than c: its count goes to
the bins beyond c in proportion to what is believed of them (one step of Efron's redistribution to the right).

A hint e is one more piece of evidence about the length L. Per class, log e is regressed on log L over finished tasks;
the fit's line and scatter are the likelihood of the hint, so a hint that says nothing changes nothing.

Where a task's text travels with it (`broker.text_features`), the histogram is one of several experts and the row is
their mixture (`csucb.text_model`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from perllm.broker.messages import Influence, LengthForecast
from perllm.broker.text_features import Sketch
from perllm.scheduler.core.cluster import Task
from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.core.service_classes import Classes
from perllm.scheduler.csucb.rows import LENGTHS, Ints, LengthsRow, Records
from perllm.scheduler.csucb.text_model import (
    BESIDE,
    NOWHERE,
    ClassText,
    Codes,
    Digests,
    Place,
    TenantText,
    Weights,
    codes_of,
    digest_of,
    heed,
    learn,
    locate,
    mix,
    strongest,
    text_codes,
)
from perllm.scheduler.csucb.token_bins import BINS, BINS_PER_DOUBLING, EDGES, Floats, bin_of, position

#: Observations after which an old one counts 1/e: in a cell, in a class.
CELL_MEMORY, CLASS_MEMORY = 400.0, 1600.0
#: What the next broader level counts for, in observations.
CELL_PRIOR, CLASS_PRIOR = 16.0, 4.0
#: Median and σ of the logarithm of the lognormal prior, tokens.
PRIOR_MEDIAN, PRIOR_SIGMA = 64.0, 1.3
#: Rows of the table that one tenant's tasks, and all, may take until the rows are dropped; beyond, a task has the
#: prior's. (A row is 2.7 kB.)
MAX_TENANT_ROWS, MAX_ROWS = 8192, 32_768
#: Of these, the share that rows for texts may take; beyond, a task has its class's.
TEXT_ROWS = 0.75
#: A class is tabulated again once its cells have grown by this share.
REFRESH_SHARE = 0.05
#: Tenants whose texts are learned, each in 250 kB; beyond, the one learned of longest ago is forgotten.
MAX_TEXTS = 64
#: Words an explanation names.
EXPLAINED = 3
#: Hints are told apart by quarter octaves.
_HINTS_PER_OCTAVE = 4

_MIDDLES = (EDGES[:-1] + EDGES[1:]) / 2


def _prior() -> Floats:
    z = (np.log(np.maximum(EDGES, 1e-9)) - math.log(PRIOR_MEDIAN)) / PRIOR_SIGMA
    below = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in z])
    below[0] = 0.0
    mass: Floats = np.diff(below) / (below[-1] - below[0])
    return mass


PRIOR: Floats = _prior()


@compiled
def _tabulate(mass: Floats, row: LengthsRow) -> None:
    """Fill a row from the probabilities (BINS,) of a distribution."""
    tail, mean, moment = row.tail, row.mean, row.moment
    total = 0.0
    for i in range(BINS):
        total += mass[i]
    left = 1.0
    tail[0], mean[0], moment[0] = 1.0, 0.0, 0.0
    for i in range(BINS):
        before = left
        left = max(0.0, left - mass[i] / total) if i < BINS - 1 else 0.0
        lo, hi = EDGES[i], EDGES[i + 1]
        width, middle = hi - lo, (before + left) / 2
        tail[i + 1] = left
        mean[i + 1] = mean[i] + width * middle
        moment[i + 1] = moment[i] + width / 6 * (lo * before + 2 * (lo + hi) * middle + hi * left)


@compiled
def _believe(cell: Floats, weight: float, of_class: Floats, class_weight: float, mass: Floats) -> None:
    """Fill the probabilities (BINS,) of a cell: its own counts leaning on its class, the class leaning on the prior."""
    for i in range(BINS):
        broad = (of_class[i] + CLASS_PRIOR * PRIOR[i]) / (class_weight + CLASS_PRIOR)
        mass[i] = (cell[i] + CELL_PRIOR * broad) / (weight + CELL_PRIOR)


@compiled
def _hint_likelihood(log_hint: float, hint_fit: Floats) -> Floats:
    """Of each bin (BINS,), as `hint_fit` (intercept, slope, σ) has it; without a hint nan first."""
    found = np.ones(BINS)
    if math.isnan(log_hint):
        found[0] = math.nan
        return found
    for i in range(BINS):
        off = (log_hint - hint_fit[0] - hint_fit[1] * math.log(_MIDDLES[i])) / hint_fit[2]
        found[i] = math.exp(-0.5 * min(off * off, 200.0))
    return found


@compiled
def _fill(
    table: Records,
    rows: Ints,
    cells: Floats,
    weights: Floats,
    of_class: Floats,
    class_weight: float,
    log_hints: Floats,
    hint_fit: Floats,
) -> None:
    """Fill n rows of the table: `cells` (n, BINS) and `weights` (n,) lean on the class, the class on the prior.

    `log_hints` (n,) is nan without a hint; `hint_fit` is (intercept, slope, σ) of log hint on log length.
    """
    mass = np.empty(BINS)
    for r in range(len(rows)):
        _believe(cells[r], weights[r], of_class, class_weight, mass)
        if not math.isnan(log_hints[r]):
            heed(mass, _hint_likelihood(log_hints[r], hint_fit))
        _tabulate(mass, table[rows[r]])


@compiled
def _fill_mixed(
    table: Records,
    row: int,
    cell: Floats,
    weight: float,
    of_class: Floats,
    class_weight: float,
    log_hint: float,
    hint_fit: Floats,
    errors: Floats,
    experts: Floats,
    place: Codes,
) -> None:
    """Fill one row with the mixture of what the cell, the text and earlier lengths of the prompt say."""
    histogram, mixed = np.empty(BINS), np.empty(BINS)
    _believe(cell, weight, of_class, class_weight, histogram)
    mix(histogram, _hint_likelihood(log_hint, hint_fit), errors, experts, place, mixed)
    _tabulate(mixed, table[row])


@compiled
def _quantiles(table: Records, row: int) -> tuple[float, float]:
    """Tokens that half, and that 90 %, of the lengths of a row are at most (the bins' upper edges)."""
    tail = table[row].tail
    median, most = EDGES[BINS], EDGES[BINS]
    for i in range(BINS, 0, -1):
        if tail[i] <= 0.5:
            median = EDGES[i]
        if tail[i] <= 0.1:
            most = EDGES[i]
    return median, most


@compiled
def _learn(
    weights: Weights,
    digests: Digests,
    prompts: Weights,
    codes: Codes,
    digest: np.uint64,
    state: Floats,
    errors: Floats,
    experts: Floats,
    cell: Floats,
    weight: float,
    of_class: Floats,
    class_weight: float,
    log_hint: float,
    hint_fit: Floats,
    tokens: float,
    ended: bool,
) -> None:
    """`text_model.learn` of a task that generated `tokens`, before the histograms learn of it."""
    histogram, target = np.empty(BINS), np.zeros(BINS)
    _believe(cell, weight, of_class, class_weight, histogram)
    if ended:
        target[bin_of(tokens)] = 1.0
    else:
        i, part = position(tokens)
        target[i:] = 1.0
        target[i] = 1.0 - part if i < BINS - 1 else 1.0
    likelihood = _hint_likelihood(log_hint, hint_fit)
    learn(weights, digests, prompts, codes, digest, state, errors, experts, histogram, likelihood, target, ended)


@dataclass(slots=True)
class Histogram:
    """Decayed counts per token bin."""

    memory: float  # observations
    counts: Floats = field(default_factory=lambda: np.zeros(BINS))
    weight: float = 0.0  # their sum

    def add(self, shares: Floats) -> None:
        """One observation, spread over bins by `shares` (BINS,), which sum to 1."""
        keep = 1.0 - 1.0 / self.memory
        self.counts *= keep
        self.counts += shares
        self.weight = self.weight * keep + 1.0


def _prior_pairs(n: float = 4.0, slope: float = 0.8, sigma: float = 0.7) -> list[float]:
    mean = math.log(PRIOR_MEDIAN)
    vx, vy = PRIOR_SIGMA**2, slope**2 * PRIOR_SIGMA**2 + sigma**2
    return [n, n * mean, n * mean, n * (vx + mean**2), n * (slope * vx + mean**2), n * (vy + mean**2)]


@dataclass(slots=True)
class HintFit:
    """Decayed regression of log hint on log length, begun with the sums of a few pairs of an average producer."""

    memory: float = 200.0  # pairs
    sums: list[float] = field(default_factory=_prior_pairs)  # n, Σx, Σy, Σx², Σxy, Σy²

    def add(self, hint: float, length: float) -> None:
        x, y = math.log(length), math.log(hint)
        keep = 1.0 - 1.0 / self.memory
        self.sums = [keep * s + a for s, a in zip(self.sums, (1.0, x, y, x * x, x * y, y * y), strict=True)]

    def line(self) -> tuple[float, float, float]:
        """Intercept, slope and σ of the scatter."""
        n, sx, sy, sxx, sxy, syy = self.sums
        vx, vy, cov = sxx / n - (sx / n) ** 2, syy / n - (sy / n) ** 2, sxy / n - sx * sy / n / n
        slope = cov / max(vx, 1e-6)
        scatter = max(vy - slope * cov, 0.0) * n / max(n - 2.0, 1.0)
        return (sy - slope * sx) / n, slope, max(math.sqrt(scatter), 0.05)


@dataclass(slots=True, eq=False)
class _Class:
    """What is known of one service class of one tenant."""

    whole: Histogram = field(default_factory=lambda: Histogram(CLASS_MEMORY))
    cells: dict[int, Histogram] = field(default_factory=dict)  # by prompt size
    hints: HintFit = field(default_factory=HintFit)
    rows: dict[tuple[int, int], int] = field(default_factory=dict)  # (prompt size, hint or −1) → row
    growth: float = 0.0  # observations since its rows were filled, each as a share of its cell
    text: ClassText | None = None  # from the first text on
    text_rows: dict[tuple[int, int, Place], _TextRow] = field(default_factory=dict)
    version: int = 0  # grows whenever rows are out of date


@dataclass(slots=True)
class _TextRow:
    """A row for tasks whose text says the same, filled when the class was at `version`."""

    row: int
    version: int


_NOT_ASKED: tuple[tuple[object, ...], int, Place, Codes] = ((), -1, NOWHERE, np.zeros(0, np.int64))
_NO_FIT: Floats = np.zeros(3)


class Lengths:
    """Output-length distributions as rows of `table`, for compiled code to read.

    `by_size` tells prompt sizes apart, `use_hints` heeds hints, `use_text` texts; `spread` False keeps the mean alone
    (for ablation).
    """

    def __init__(
        self, *, by_size: bool = True, use_hints: bool = True, spread: bool = True, use_text: bool = True
    ) -> None:
        self._by_size, self._use_hints, self._spread, self._use_text = by_size, use_hints, spread, use_text
        self._classes = Classes(_Class)
        self._texts: OrderedDict[str, TenantText] = OrderedDict()  # by tenant, in the order last learned of
        self._unknown = _Class()  # the prior's alone
        self._count = 0
        self._tenant_rows: dict[str, int] = {}
        # Of the task last asked about: what it was, its row, what its text says, its codes; until something is learned.
        self._asked: tuple[tuple[object, ...], int, Place, Codes] = _NOT_ASKED
        self._stale: dict[_Class, None] = {}  # classes whose rows are out of date, in order
        self.table: Records = np.zeros(16, LENGTHS)

    # --- learning

    def observe(
        self,
        service: str,
        prompt: int,
        tokens: int,
        *,
        ended: bool,
        hint: int | None = None,
        tenant: str = "default",
        text: Sketch = b"",
        max_tokens: int = 0,
        model: str | None = None,
    ) -> None:
        """A task of this class generated `tokens`: all it had to (`ended`), or it was cut and would have gone on."""
        if not ended and tokens <= 0:
            return
        self._asked = _NOT_ASKED
        known = self._classes.get(tenant, service)
        cell = known.cells.setdefault(self._size(prompt), Histogram(CELL_MEMORY))
        if text and self._use_text:
            self._learn_text(
                known, cell, tenant, text, codes_of(text, service, prompt, max_tokens, model), hint, tokens, ended=ended
            )
        shares = _shares(bin_of(max(tokens, 1))) if ended else self._beyond(known, cell, float(tokens))
        known.whole.add(shares)
        cell.add(shares)
        if ended and hint is not None:
            known.hints.add(float(hint), float(max(tokens, 1)))
        known.growth += 1.0 / cell.weight
        if known.growth >= REFRESH_SHARE:
            self._stale[known] = None
            known.version += 1

    def _learn_text(
        self,
        known: _Class,
        cell: Histogram,
        tenant: str,
        sketch: Sketch,
        codes: Codes,
        hint: int | None,
        tokens: int,
        *,
        ended: bool,
    ) -> None:
        texts = self._texts
        fresh = tenant not in texts
        if not fresh:
            texts.move_to_end(tenant)
        else:
            texts[tenant] = TenantText()
            if len(texts) > MAX_TEXTS:
                texts.popitem(last=False)
        of_tenant, text = texts[tenant], known.text or ClassText()
        asleep = text.experts.copy() if fresh or known.text is None else None  # the histogram alone was asked
        known.text = text
        of_tenant.learned()
        _learn(
            of_tenant.weights,
            of_tenant.digests,
            of_tenant.prompts,
            codes,
            digest_of(sketch),
            text.state,
            text.errors,
            text.experts,
            cell.counts,
            cell.weight,
            known.whole.counts,
            known.whole.weight,
            self._log_hint(hint),
            np.array(known.hints.line()) if hint is not None else _NO_FIT,
            float(max(tokens, 1)) if ended else float(tokens),
            ended,
        )
        if asleep is not None:
            text.experts[:] = asleep

    def _beyond(self, known: _Class, cell: Histogram, tokens: float) -> Floats:
        """One count over the bins beyond `tokens`, as they are believed to share it."""
        mass = _believed(known.whole, cell)
        i, part = position(tokens)
        mass[:i] = 0.0
        mass[i] *= 1.0 - part
        total = mass.sum()
        if total < 1e-9:
            return _shares(min(i + 1, BINS - 1))
        mass /= total
        return mass

    # --- reading

    def row(
        self,
        service: str,
        prompt: int,
        hint: int | None = None,
        tenant: str = "default",
        *,
        text: Sketch = b"",
        max_tokens: int = 0,
        model: str | None = None,
    ) -> int:
        """The row of `table` for such a task. It holds after the next `refresh`."""
        known = self._classes.get(tenant, service)
        size = self._size(prompt)
        hinted = -1 if hint is None or not self._use_hints else round(_HINTS_PER_OCTAVE * math.log2(hint))
        if text and known.text is not None and self._use_text:
            asked = service, prompt, hint, tenant, text, max_tokens, model
            if self._asked[0] == asked:  # a decision asks several times
                return self._asked[1]
            codes = codes_of(text, service, prompt, max_tokens, model)
            place = self._place(known, tenant, text, codes)
            if place is not NOWHERE and (found := self._text_row(known, size, hinted, place, tenant)) is not None:
                self._asked = asked, found, place, codes
                return found
        row = known.rows.get((size, hinted))
        return self._new_row(known, size, hinted, tenant) if row is None else row

    def row_of(self, task: Task) -> int:
        """The same for a task as the core has it. One that generates nothing has the prior's: nothing hangs on it."""
        if not task.generates:
            return self._unknown_row()
        return self.row(
            task.service,
            task.prompt_tokens,
            task.expected_tokens,
            task.tenant,
            text=task.text,
            max_tokens=task.max_tokens,
            model=task.model,
        )

    def forecast(self, task: Task) -> LengthForecast:
        """What is believed of a task's length, and why."""
        row = self.row_of(task)
        self.refresh()
        median, most = _quantiles(self.table, row)
        _, of_text, place, codes = self._asked
        known, of_tenant = self._classes.get(task.tenant, task.service), self._texts.get(task.tenant)
        if not task.text or row != of_text or known.text is None or of_tenant is None:
            return LengthForecast.model_construct(median=median, most=most, source="class")
        histogram, text, repeat = known.text.experts.tolist()
        at, moves = strongest(of_tenant.weights, codes[: -len(BESIDE)], EXPLAINED)
        if place.repeat >= 0 and repeat > max(histogram, text):
            return LengthForecast.model_construct(median=median, most=most, source="prompt")
        sent, because = text_codes(task.text), []
        for i, move in zip(at.tolist(), moves.tolist(), strict=True):
            if abs(factor := 2.0 ** (move / BINS_PER_DOUBLING) - 1.0) >= 0.05:
                because.append(Influence.model_construct(code=sent[i], factor=round(factor + 1.0, 3)))
        source: Literal["class", "text"] = "text" if text > histogram else "class"
        return LengthForecast.model_construct(median=median, most=most, source=source, because=tuple(because))

    def _place(self, known: _Class, tenant: str, sketch: Sketch, codes: Codes) -> Place:
        """What the text says of the length."""
        of_tenant = self._texts.get(tenant)
        if of_tenant is None or known.text is None:
            return NOWHERE
        return Place(
            *locate(
                of_tenant.weights,
                of_tenant.digests,
                of_tenant.prompts,
                codes,
                digest_of(sketch),
                known.text.state,
            )
        )

    def _text_row(self, known: _Class, size: int, hinted: int, place: Place, tenant: str) -> int | None:
        """The row of what text says, filled; None where the tenant has no more."""
        key = size, hinted, place
        found = known.text_rows.get(key)
        if found is None:
            if (row := self._take_row(tenant, TEXT_ROWS)) is None:
                return None
            found = known.text_rows[key] = _TextRow(row, -1)
        if found.version != known.version and known.text is not None:
            cell = known.cells.get(size) or _NOTHING
            found.version = known.version
            _fill_mixed(
                self.table,
                found.row,
                cell.counts,
                cell.weight,
                known.whole.counts,
                known.whole.weight,
                math.nan if hinted < 0 else hinted / _HINTS_PER_OCTAVE * math.log(2),
                np.array(known.hints.line()) if hinted >= 0 else _NO_FIT,
                known.text.errors,
                known.text.experts,
                np.array(place),
            )
            if not self._spread:
                _collapse(self.table, np.array([found.row]))
        return found.row

    def _log_hint(self, hint: int | None) -> float:
        return math.nan if hint is None or not self._use_hints else math.log(hint)

    def _new_row(self, known: _Class, size: int, hinted: int, tenant: str) -> int:
        row = self._take_row(tenant)
        if row is None:
            return self._unknown_row()
        known.rows[size, hinted] = row
        self._stale[known] = None
        return row

    def _unknown_row(self) -> int:
        """The row of the prior."""
        row = self._unknown.rows.get((0, -1))
        if row is None:
            row = self._unknown.rows[0, -1] = self._add_row("")
            self._stale[self._unknown] = None
        return row

    def _take_row(self, tenant: str, share: float = 1.0) -> int | None:
        """A row of the table nobody has; None where the tenant, or all together, have this share of what they may."""
        if self._tenant_rows.get(tenant, 0) >= share * MAX_TENANT_ROWS or self._count >= share * MAX_ROWS:
            return None
        return self._add_row(tenant)

    def _add_row(self, tenant: str) -> int:
        self._tenant_rows[tenant] = self._tenant_rows.get(tenant, 0) + 1
        row = self._count
        self._count += 1
        if self._count > len(self.table):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
        return row

    def refresh(self) -> None:
        """Bring the rows of stale classes up to date."""
        for known in self._stale:
            self._refresh(known)
        self._stale.clear()

    def forget(self) -> None:
        """Drop the rows; they are made from the counts when asked for again."""
        for known in (self._unknown, *(each for _, _, each in self._classes)):
            known.rows.clear()
            known.text_rows.clear()
            known.growth = 0.0
        self._asked = _NOT_ASKED
        self._count = 0
        self._tenant_rows.clear()
        self._stale.clear()

    def _refresh(self, known: _Class) -> None:
        known.growth = 0.0
        if not known.rows:
            return  # nobody has asked yet, as after a restart
        nothing = np.zeros(BINS)
        keys = list(known.rows)
        cells = [known.cells.get(size) for size, _ in keys]
        counts = np.array([c.counts if c else nothing for c in cells])
        weights = np.array([c.weight if c else 0.0 for c in cells])
        hints = np.array([math.nan if h < 0 else h / _HINTS_PER_OCTAVE * math.log(2) for _, h in keys])
        rows = np.fromiter(known.rows.values(), np.int64, len(keys))
        fit = np.array(known.hints.line())
        _fill(self.table, rows, counts, weights, known.whole.counts, known.whole.weight, hints, fit)
        if not self._spread:
            _collapse(self.table, rows)

    def _size(self, prompt: int) -> int:
        """Prompt sizes are told apart by doublings."""
        return max(prompt, 1).bit_length() if self._by_size else 0

    # --- kept over a restart

    def snapshot(self) -> list[Any]:
        """[tenant, class, what is known] of each class of which something is."""
        return [
            [
                tenant,
                name,
                {
                    "whole": _sparse(known.whole),
                    "cells": {str(size): _sparse(cell) for size, cell in known.cells.items()},
                    "hints": known.hints.sums,
                    "text": known.text and known.text.snapshot(),
                },
            ]
            for tenant, name, known in self._classes
            if known.whole.weight
        ]

    def snapshot_texts(self) -> list[Any]:
        """[tenant, what is known of its words and prompts], the one learned of longest ago first."""
        return [[tenant, text.snapshot()] for tenant, text in self._texts.items()]

    def restore(self, state: list[Any], texts: Iterable[Any] = ()) -> None:
        """Take over what `snapshot` and `snapshot_texts` returned. Raises ValueError or KeyError for foreign ones."""
        classes = Classes(_Class)
        for tenant, name, given in state:
            classes.put(
                tenant,
                name,
                _Class(
                    whole=_dense(given["whole"], CLASS_MEMORY),
                    cells={int(size): _dense(cell, CELL_MEMORY) for size, cell in given["cells"].items()},
                    hints=HintFit(sums=[float(s) for s in given["hints"]]),
                    text=ClassText.restored(given["text"]) if given.get("text") else None,
                ),
            )
        known_texts = OrderedDict((tenant, TenantText.restored(given)) for tenant, given in texts)
        self._classes, self._texts = classes, known_texts
        self.forget()


_NOTHING = Histogram(CELL_MEMORY)


def _believed(whole: Histogram, cell: Histogram) -> Floats:
    """Probabilities (BINS,) of a cell: its own counts leaning on its class, the class leaning on the prior."""
    broad = (whole.counts + CLASS_PRIOR * PRIOR) / (whole.weight + CLASS_PRIOR)
    return (cell.counts + CELL_PRIOR * broad) / (cell.weight + CELL_PRIOR)


def _shares(i: int) -> Floats:
    """One count at bin `i`, a quarter of it in each neighbour: lengths near each other are alike."""
    shares = np.zeros(BINS)
    shares[i] += 0.5
    shares[max(i - 1, 0)] += 0.25
    shares[min(i + 1, BINS - 1)] += 0.25
    return shares


@compiled
def _collapse(table: Records, rows: Ints) -> None:
    """Replace each of these distributions by its mean."""
    for r in rows:
        mass = np.zeros(BINS)
        mass[bin_of(max(1.0, table[r].mean[BINS]))] = 1.0
        _tabulate(mass, table[r])


def _sparse(histogram: Histogram) -> dict[str, Any]:
    counts = {str(i): float(histogram.counts[i]) for i in np.flatnonzero(histogram.counts)}
    return {"weight": histogram.weight, "counts": counts}


def _dense(given: dict[str, Any], memory: float) -> Histogram:
    counts = np.zeros(BINS)
    for i, count in given["counts"].items():
        counts[int(i)] = count
    return Histogram(memory, counts, float(given["weight"]))
