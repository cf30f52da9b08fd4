"""Token bins: their width grows with the token count, so that one short array covers 1 to 130,000 tokens.

Bins are one token wide up to 8, two up to 24, four up to 56, and so on: eight per doubling of tokens + 8. Which bin a
count is in, and where in it, can be read off the bits of the floating-point number, which makes a lookup cost 2 ns.
Functions of tokens are kept by their values at the edges and are linear between.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.core.compiled import compiled

Floats = NDArray[np.float64]

_SHIFT = 49  # of a float's 52 mantissa bits, all but the first three
_FIRST = int(np.float64(8.0).view(np.int64)) >> _SHIFT
_MASK = (1 << _SHIFT) - 1
_SCALE = 1.0 / (1 << _SHIFT)

#: Number of bins, and of those per doubling of tokens + 8.
BINS_PER_DOUBLING = 8
BINS = 14 * BINS_PER_DOUBLING
#: Their edges, tokens; bin i holds counts in (EDGES[i], EDGES[i+1]].
EDGES: Floats = np.array([(8 + i % 8) * 2.0 ** (i // 8) - 8 for i in range(BINS + 1)])


@compiled
def position(tokens: float) -> tuple[int, float]:
    """The bin that `tokens` lies in and the fraction of it below `tokens`; beyond the edges, the first or last edge."""
    bits = np.float64(tokens + 8.0).view(np.int64)
    i = (bits >> _SHIFT) - _FIRST
    if i < 0:
        return 0, 0.0
    if i >= BINS:
        return BINS - 1, 1.0
    return int(i), (bits & _MASK) * _SCALE


@compiled
def at(values: Floats, tokens: float) -> float:
    """A function given by its `values` (BINS + 1,) at the edges, at `tokens`."""
    i, part = position(tokens)
    low, high = values[i], values[i + 1]
    return float(low + part * (high - low))


@compiled
def bin_of(tokens: float) -> int:
    """The bin a whole count of tokens (≥ 1) is in; edges belong to the bin below them."""
    i, part = position(float(tokens))
    return i - 1 if part == 0.0 and i > 0 else i
