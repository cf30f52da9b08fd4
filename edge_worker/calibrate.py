"""A few seconds of measuring at boot: how long an engine step takes, by what is in it."""

from __future__ import annotations

import time

import numpy as np

from perllm.broker.messages import StepCost
from perllm.edge_worker.batch import BatchTuning
from perllm.edge_worker.batch_plan import Widths
from perllm.edge_worker.embedding_batch import EmbeddingTuning
from perllm.edge_worker.llama import OK, Context, LlamaError

#: Measuring may take so long, s; a slow model gets fewer points, never fewer than are needed.
BUDGET = 2.0
#: A step should not hold up running decodes for longer than this for the sake of a prompt, s.
CHUNK_SECONDS = 0.25
#: Prompt tokens llama.cpp's attention takes in one go, faster than fewer (GGML_FA_TILE_Q in ggml-cpu/common.h).
TILE = 64
MOST_TILES = 8
#: Tokens of a step that embeds: with fewer, llama.cpp gets slower per token; with more, no faster (measured: 250, 299,
#: 292, 272, 252 tokens/s at 64, 128, 256, 512, 1024).
LEAST_EMBEDDED, MOST_EMBEDDED = 128, 512
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


def calibrate_embedding(context: Context, *, longest: int, token: int, budget: float = BUDGET) -> EmbeddingTuning:
    """The same for a context that embeds inputs of up to `longest` tokens: what a step, an input, a token cost. Raises
    LlamaError."""
    until = time.monotonic() + budget
    length = min(longest, LEAST_EMBEDDED) // 2
    _timed_inputs(context, [1], token)  # warm up
    kinds = [[1], [length], [length // 8] * 16]
    seconds = [float("inf")] * len(kinds)
    rounds = 0
    while rounds < 1 or (rounds < 5 and time.monotonic() < until):
        for kind, lengths in enumerate(kinds):
            seconds[kind] = min(seconds[kind], _timed_inputs(context, lengths, token))
        rounds += 1
    one, long, many = seconds
    prefill = max(long - one, 1e-9) / (length - 1)
    step = max(0.0, one - prefill)
    sequence = max(0.0, many - step - prefill * sum(kinds[2])) / 16
    chunk = min(max(round(CHUNK_SECONDS / prefill), LEAST_EMBEDDED), MOST_EMBEDDED, context.batch_tokens)
    return EmbeddingTuning(chunk=chunk, step_cost=StepCost(step=step, sequence=sequence, prefill=prefill))


def _timed_inputs(context: Context, lengths: list[int], token: int) -> float:
    """Seconds of one step with inputs of so many tokens."""
    context.begin()
    for sequence, tokens in enumerate(lengths):
        context.add(sequence, 0, [token] * tokens, output=True)
    began = time.perf_counter()
    if (status := context.decode()) != OK:
        raise LlamaError(f"llama.cpp could not compute (status {status})")
    context.vector(0)
    seconds = time.perf_counter() - began
    context.clear()
    return seconds
