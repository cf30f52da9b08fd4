"""A node's future rolled out: what becomes of the attempts it holds if nothing else comes.

This is how the oracles look ahead. It is compiled, on rows of structured arrays as CS-UCB's forecast is (see
`csucb.rows`), but follows each sample of the future step by step, where that one works with distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.rows import Records, dtype_of
from perllm.scheduler.csucb.token_bins import Floats

#: Phases of an attempt.
QUEUED, TRANSFERRING, PREFILLING, DECODING, OVER = range(5)


@dataclass(slots=True)
class AttemptRow:
    """An attempt on the node. A rollout fills what has a default: how far the attempt is in one sample."""

    transfer: float  # s its payload yet needs of the link
    prompt_left: float  # tokens yet to prefill
    held: float  # tokens in the KV cache once that is done
    time_left: float  # s to its deadline
    value: float
    phase: int = QUEUED
    arrival: float = 0.0  # of its payload, s from now
    output_left: float = 0.0  # tokens
    context: float = 0.0  # tokens held


@dataclass(slots=True)
class NodeStateRow:
    """A node's limits and its present speed."""

    slots: int
    chunk: int  # prompt tokens prefilled per step
    prefill_watts: float  # idle power left out
    frozen: float  # s it stands still from now on
    factor: float  # on its table's step times after that


@dataclass(slots=True)
class DecodeRow:
    """A decode step, by batch size."""

    base: float  # s
    slope: float  # s per context token held
    watts: float  # idle power left out


@dataclass(slots=True)
class PrefillRow:
    """A step that only prefills, by its tokens (see `StepTable.prefill`)."""

    tokens: float
    seconds: float


ATTEMPT, NODE_STATE, DECODE, PREFILL = map(dtype_of, (AttemptRow, NodeStateRow, DecodeRow, PrefillRow))


class Attempts(NamedTuple):
    """The attempts on a node in the order of its queue, those with a slot first."""

    with_slot: int  # how many have one
    rows: Records  # AttemptRow
    output_left: Floats  # (samples, attempts): tokens yet to generate, in each sample of the future


class RolloutNode(NamedTuple):
    """A node and its step table."""

    state: Records  # one NodeStateRow
    decode: Records  # DecodeRow, by batch size
    prefill: Records  # PrefillRow, tokens ascending


class Batch(NamedTuple):
    """What the engine has to do."""

    decoding: int  # sequences
    context: float  # tokens they hold
    fewest_left: float  # steps until the first of them ends
    prefilling: int  # the attempt to prefill; −1: none
    next_change: float  # when a payload arrives or a deadline passes, s from now


class StepSeries(NamedTuple):
    """Engine steps in a row."""

    steps: float
    seconds: float
    joules: float


@compiled
def _begin(attempts: Attempts, sample: int, rows: Records, time: float) -> float:
    """Set the attempts to the present; returns when the link is free, s from now."""
    link_free = 0.0
    for j in range(len(rows)):
        row: AttemptRow = rows[j]
        row.output_left, row.context = attempts.output_left[sample, j], row.held
        if j >= attempts.with_slot:
            row.phase = QUEUED
            continue
        link_free += row.transfer
        row.arrival = link_free if row.transfer > 0 else 0.0
        if row.arrival > time:
            row.phase = TRANSFERRING
        else:
            row.phase = PREFILLING if row.prompt_left > 0 else DECODING
    return link_free


@compiled
def _stop_late(rows: Records, time: float) -> int:
    """End the attempts whose deadline has passed; returns how many slots they give up."""
    given_up = 0
    for j in range(len(rows)):
        row: AttemptRow = rows[j]
        if row.phase != OVER and row.time_left <= time:
            given_up += row.phase != QUEUED
            row.phase = OVER
    return given_up


@compiled
def _fill_slots(rows: Records, time: float, free: int, head: int, link_free: float) -> tuple[int, int, float]:
    """Give the `free` slots to queued attempts, the next of which is `head`, and send their payloads one after the
    other. Returns free, head and link_free as they are then."""
    while head < len(rows) and free > 0:
        row: AttemptRow = rows[head]
        if row.phase == QUEUED:
            link_free = max(link_free, time) + row.transfer
            row.phase, row.arrival = TRANSFERRING, link_free
            free -= 1
        head += 1
    return free, head, link_free


@compiled
def _next_batch(rows: Records, time: float) -> Batch:
    """What there is to do. Attempts whose payload has arrived are prefilled, first come first served."""
    decoding, context, fewest_left, prefilling, next_change = 0, 0.0, math.inf, -1, math.inf
    for j in range(len(rows)):
        row: AttemptRow = rows[j]
        if row.phase in (QUEUED, OVER):
            continue
        next_change = min(next_change, row.time_left)
        if row.phase == TRANSFERRING and row.arrival <= time:
            row.phase = PREFILLING
        if row.phase == TRANSFERRING:
            next_change = min(next_change, row.arrival)
        elif row.phase == DECODING:
            decoding, context, fewest_left = decoding + 1, context + row.context, min(fewest_left, row.output_left)
        elif prefilling < 0:
            prefilling = j
    return Batch(decoding, context, fewest_left, prefilling, next_change)


@compiled
def _prefill_seconds(points: Records, tokens: float) -> float:
    """Seconds of a step that only prefills."""
    i = 1
    while i < len(points) - 1 and points[i].tokens < tokens:
        i += 1
    here: PrefillRow = points[i - 1]
    there: PrefillRow = points[i]
    slope = (there.seconds - here.seconds) / (there.tokens - here.tokens)
    return here.seconds + slope * (tokens - here.tokens)


@compiled
def _prefill(prompt: float, batch: Batch, node: RolloutNode) -> StepSeries:
    """All steps of one prompt, in each of which the others decode on."""
    state: NodeStateRow = node.state[0]
    table: DecodeRow = node.decode[batch.decoding]
    steps = math.ceil(prompt / state.chunk)
    prefill = _prefill_seconds(node.prefill, prompt / steps)
    decode = 0.0
    if batch.decoding > 0:  # reading the weights is paid once
        decode = table.base + table.slope * batch.context
        prefill -= node.prefill[0].seconds
    joules = decode * table.watts + prefill * state.prefill_watts
    return StepSeries(float(steps), state.factor * steps * (decode + prefill), state.factor * steps * joules)


@compiled
def _series_seconds(first: float, growth: float, steps: float) -> float:
    """Seconds of `steps` steps of which the first takes `first` and each next one `growth` more."""
    return steps * first + growth * steps * (steps - 1) / 2


@compiled
def _steps_to_pass(span: float, first: float, growth: float) -> float:
    """The fewest such steps (at least 1) that take `span` seconds or more."""
    if growth > 0:
        b = first - growth / 2
        steps = math.ceil((math.sqrt(b * b + 2 * growth * span) - b) / growth)
    else:
        steps = math.ceil(span / first)
    return float(max(steps, 1))


@compiled
def _decode(batch: Batch, node: RolloutNode, time: float) -> StepSeries:
    """Decode steps until a sequence ends, or the first that ends after the next change."""
    state: NodeStateRow = node.state[0]
    table: DecodeRow = node.decode[batch.decoding]
    first = state.factor * (table.base + table.slope * batch.context)
    growth = state.factor * table.slope * batch.decoding
    span = max(batch.next_change - time, 0.0)
    steps = batch.fewest_left
    if _series_seconds(first, growth, steps) > span:
        steps = min(_steps_to_pass(span, first, growth), steps)
    seconds = _series_seconds(first, growth, steps)
    return StepSeries(steps, seconds, seconds * table.watts)


@compiled
def _advance(rows: Records, time: float, steps: float, prefilled: int, value: float) -> tuple[int, float]:
    """Count the tokens of `steps` steps that end at `time`: one each for what decodes, the first for what was
    prefilled. Returns how many attempts are done, and `value` with that of those on time."""
    done = 0
    for j in range(len(rows)):
        row: AttemptRow = rows[j]
        if row.phase == DECODING:
            row.output_left -= steps
            row.context += steps
        elif j == prefilled:
            row.phase = DECODING
            row.output_left -= 1
            row.context += 1
        if row.phase == DECODING and row.output_left <= 0:
            row.phase = OVER
            done += 1
            if time <= row.time_left:
                value += row.value
    return done, value


@compiled
def rollout(count: int, attempts: Attempts, node: RolloutNode) -> tuple[float, float]:
    """The on-time value and the J (idle apart) of the first `count` attempts, means over the samples.

    Payloads travel one after the other, those of queued attempts once they have a slot. An attempt stops at its
    deadline. A prompt is prefilled in one stretch.
    """
    value, joules = 0.0, 0.0
    samples, rows = len(attempts.output_left), attempts.rows[:count]
    state: NodeStateRow = node.state[0]
    for sample in range(samples):
        time, head = state.frozen, min(attempts.with_slot, count)
        free = state.slots - head
        link_free = _begin(attempts, sample, rows, time)
        while True:
            free += _stop_late(rows, time)
            free, head, link_free = _fill_slots(rows, time, free, head, link_free)
            batch = _next_batch(rows, time)
            if batch.prefilling >= 0:
                series = _prefill(rows[batch.prefilling].prompt_left, batch, node)
            elif batch.decoding > 0:
                series = _decode(batch, node, time)
            elif not math.isinf(batch.next_change):
                time = batch.next_change
                continue
            else:
                break
            time += series.seconds
            joules += series.joules
            done, value = _advance(rows, time, series.steps, batch.prefilling, value)
            free += done
    return value / samples, joules / samples
