"""The batch's decisions, apart from the doing: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Part of a step's prefill budget the oldest prompt always gets, so that short ones never starve it.
OLDEST_SHARE = 0.25
#: A split into narrower decodes must promise at least this gain over one decode: measurements are noisy.
SPLIT_GAIN = 0.9


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


def best_splits(cost: Mapping[int, float], widest: int) -> list[tuple[int, ...]]:
    """For each number n of decoding sequences, 0 to `widest`, the widths of decodes that serve them all in least time.

    `cost` is the time of one decode at the widths measured (1 among them), s; between them it is interpolated. One
    decode of n is preferred unless a split promises a clear gain. llama.cpp's kernels for two to eight columns can be
    slower than one column after another (measured: Q8_0 with AVX-512: 5.7 ms for 1, 24 ms for 2).
    """
    known = sorted(cost)
    whole = [0.0, *(_interpolate(known, cost, n) for n in range(1, widest + 1))]
    best = [0.0]
    splits: list[tuple[int, ...]] = [()]
    for n in range(1, widest + 1):
        first = min(range(1, n + 1), key=lambda width: (whole[width] + best[n - width], -width))
        if whole[first] + best[n - first] >= SPLIT_GAIN * whole[n]:
            first = n
        best.append(whole[first] + best[n - first])
        splits.append((first, *splits[n - first]))
    return splits


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
