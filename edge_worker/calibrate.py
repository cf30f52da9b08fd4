"""A few seconds of measuring at boot: how long an engine step takes, by what is in it."""

from __future__ import annotations

import time

import numpy as np

from perllm.broker.messages import StepCost
from perllm.edge_worker.batch import BatchTuning
from perllm.edge_worker.batch_plan import Widths
from perllm.edge_worker.llama import OK, Context, LlamaError

#: Measuring may take so long, s; a slow model gets fewer points, never fewer than are needed.
BUDGET = 2.0
#: A step should not hold up running decodes for longer than this for the sake of a prompt, s.
CHUNK_SECONDS = 0.25
#: Prompt tokens llama.cpp's attention takes in one go, faster than fewer (GGML_FA_TILE_Q in ggml-cpu/common.h).
TILE = 64
MOST_TILES = 8
_PROBE = 64  # prompt tokens prefilled at a time
_DEPTH = 512  # context tokens at which the cost of context is measured
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def calibrate(context: Context, *, slots: int, token: int, budget: float = BUDGET) -> BatchTuning:
    """Measure an empty `context`, and leave it empty. `token` is any token to compute with. Raises LlamaError."""
    began = time.monotonic()
    _timed(context, [(0, 0, 1)], token)  # warm up
    shallow = _repeated(context, [(0, 1, 1)], token, began + budget / 8)
    prefill, depth = _prefill(context, token, began + budget / 2)
    deep = _repeated(context, [(0, depth, 1)], token, began + budget * 5 / 8)
    context.clear()
    cost = _widths(context, slots, token, shallow, began + budget)
    context.clear()
    widths = Widths(cost, slots)
    times = [widths.time(n) for n in cost]
    sequence, step = np.polyfit(list(cost), times, 1) if len(cost) > 1 else (0.0, times[0])
    sequence = max(0.0, float(sequence))
    step_cost = StepCost(
        step=max(0.0, float(step)) or max(0.0, times[0] - sequence),
        sequence=sequence,
        prefill=prefill,
        context=max(0.0, (deep - shallow) / depth),
    )
    tiles = min(round(CHUNK_SECONDS / prefill / TILE), MOST_TILES)
    return BatchTuning(chunk=tiles * TILE or TILE // 2, widths=widths, step_cost=step_cost)


def _timed(context: Context, parts: list[tuple[int, int, int]], token: int) -> float:
    """Seconds of one decode of (sequence, position, tokens) each."""
    context.begin()
    for sequence, position, tokens in parts:
        row = context.add(sequence, position, [token] * tokens, output=True)
    began = time.perf_counter()
    if (status := context.decode()) != OK:
        raise LlamaError(f"llama.cpp could not compute (status {status})")
    context.logits(row)
    return time.perf_counter() - began


def _repeated(context: Context, parts: list[tuple[int, int, int]], token: int, until: float) -> float:
    """Time of a decode, the least disturbed of up to five, each undone."""
    times: list[float] = []
    while not times or (len(times) < 5 and time.monotonic() < until):
        times.append(_timed(context, parts, token))
        for sequence, position, _ in parts:
            context.remove(sequence, position)
    return min(times)


def _prefill(context: Context, token: int, until: float) -> tuple[float, int]:
    """(seconds per prompt token, tokens of sequence 0 now in the cache)."""
    at = 1
    times: list[float] = []
    while not times or (time.monotonic() < until and at + 2 * _PROBE < min(_DEPTH, context.kv_tokens)):
        times.append(_timed(context, [(0, at, _PROBE)], token))
        at += _PROBE
    return min(times) / _PROBE, at


def _widths(context: Context, slots: int, token: int, one: float, until: float) -> dict[int, float]:
    """Seconds of a decode by its width, widest first so that a short budget still brackets the rest."""
    cost = {1: one}
    widths = sorted({w for w in _WIDTHS if w < slots} | {slots}, reverse=True)
    for width in widths:
        if width > 1 and (len(cost) < 2 or time.monotonic() < until):
            parts = [(sequence, 0, 1) for sequence in range(width)]
            cost[width] = _repeated(
                context, parts, token, min(until, time.monotonic() + (until - time.monotonic()) / 4)
            )
    return dict(sorted(cost.items()))
