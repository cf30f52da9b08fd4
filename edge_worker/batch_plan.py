"""The batch's decisions, apart from their execution: pure functions of numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

#: Part of a step's prefill budget the oldest prompt always gets, so that short ones never starve it.
OLDEST_SHARE = 0.25
#: A split is considered where calibration finds it no slower than this times one decode: measurements are noisy.
SPLIT_TOLERANCE = 1.25
#: Every so many steps the plan thought slower is explored again.
EXPLORE_EVERY = 50


def share_prefill(remaining: Sequence[int], budget: int) -> list[int]:
    """How many prompt tokens of each request to prefill in the next step.

    `remaining` are the tokens left of each prompt, oldest request first. Shortest remaining first, for the least mean
    time to first token, but the oldest gets its share whatever comes. The sum never exceeds `budget`; all of it is used
    while tokens remain.
    """
    given = [0] * len(remaining)
    if not remaining:
        return given
    given[0] = min(remaining[0], max(1, int(budget * OLDEST_SHARE)), budget)
    left = budget - given[0]
    for i in sorted(range(len(remaining)), key=lambda i: (remaining[i], i)):
        more = min(remaining[i] - given[i], left)
        given[i] += more
        left -= more
    return given


def share_inputs(lengths: Sequence[Sequence[int]], left: Sequence[int], budget: int, most: int) -> list[int]:
    """How many of each request's next inputs to compute in the next step, `most` inputs at most in all.

    `lengths` are the tokens of their next inputs, `left` those of all that are left, oldest request first. An input is
    taken whole. The oldest request gets one in any case, and its share of the `budget` of tokens; the others follow by
    what they have left, least first, for the least mean time to their ends.
    """
    taken = [0] * len(lengths)
    count, used = 0, 0

    def take(i: int, until: int) -> None:
        nonlocal count, used
        for length in lengths[i][taken[i] :]:
            if count == most or used + length > until:
                return
            taken[i] += 1
            count, used = count + 1, used + length

    take(0, max(lengths[0][0], int(budget * OLDEST_SHARE)))
    for i in sorted(range(len(lengths)), key=lambda i: (left[i], i)):
        take(i, budget)
    return taken


class Widths:
    """Chooses the widths of the decodes that serve n sequences: one decode of n, or several narrower ones.

    llama.cpp's kernels for a few columns can be slower than one column after another (measured: SmolLM2 Q8_0, AVX-512:
    5.7 ms for 1, 24 ms for 2, 34 ms for 4, 43 ms for 8). Calibration says where a split may pay; which of the two is
    faster is then measured at work, the other one tried now and then, since both the machine's load and the context
    change it.
    """

    def __init__(self, cost: Mapping[int, float], widest: int) -> None:
        """`cost`: s of one decode by its width, 1 among them; what lies between is interpolated."""
        known = sorted(cost)
        whole = [0.0, *(_interpolate(known, cost, n) for n in range(1, widest + 1))]
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # time and widths of the best way to serve n
        self._plans: list[list[_Plan]] = [[_Plan((), 0.0)]]
        for n in range(1, widest + 1):
            plans = [_Plan((n,), whole[n])]
            if n > 1:
                first = min(range(1, n), key=lambda width: (whole[width] + best[n - width][0], -width))
                time = whole[first] + best[n - first][0]
                if time < SPLIT_TOLERANCE * whole[n]:
                    plans.append(_Plan((first, *best[n - first][1]), time))
            fastest = min(plans, key=lambda plan: plan.time)
            best.append((fastest.time, fastest.widths))
            self._plans.append(plans)
        self._steps = [0] * (widest + 1)

    def time(self, n: int) -> float:
        """The time to serve n sequences, as far as known, s."""
        return min(plan.time for plan in self._plans[n])

    def choose(self, n: int) -> tuple[int, ...]:
        """The widths of the decodes for n sequences, summing to n."""
        ordered = sorted(self._plans[n], key=lambda plan: plan.time)
        self._steps[n] += 1
        return ordered[-1 if self._steps[n] % EXPLORE_EVERY == 0 else 0].widths

    def observe(self, widths: tuple[int, ...], seconds: float) -> None:
        """A step of just these decodes took so long."""
        for plan in self._plans[sum(widths)]:
            if plan.widths == widths:
                plan.seen.append(seconds)


@dataclass(slots=True)
class _Plan:
    widths: tuple[int, ...]
    expected: float  # s
    seen: deque[float] = field(default_factory=lambda: deque(maxlen=5))  # s, the latest steps

    @property
    def time(self) -> float:
        return median(self.seen) if self.seen else self.expected


def _interpolate(known: Sequence[int], cost: Mapping[int, float], n: int) -> float:
    if n in cost:
        return cost[n]
    below = max((k for k in known if k < n), default=None)
    above = min((k for k in known if k > n), default=None)
    if below is None or above is None:  # beyond what was measured: in proportion
        nearest = below or above or n
        return cost[nearest] * n / nearest
    part = (n - below) / (above - below)
    return cost[below] * (1 - part) + cost[above] * part


def choose_victim(worth: Sequence[tuple[float, int]]) -> int:
    """Which request to preempt when the KV cache is full: the one of least value per remaining token.

    `worth` is each request's (value, tokens still to compute), oldest first; of equals the youngest goes.
    """
    return min(range(len(worth)), key=lambda i: (worth[i][0] / max(1, worth[i][1]), -i))
