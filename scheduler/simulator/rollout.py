"""A node's future rolled out: what becomes of the attempts it holds if nothing else comes.

This is how the oracles look ahead. It is compiled; all of it is in this file, because numba's cache on disk knows a
function by its own file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
F = TypeVar("F", bound=Callable[..., object])

#: Phases of an attempt.
QUEUED, TRANSFERRING, PREFILLING, DECODING, OVER = range(5)


class Attempts(NamedTuple):
    """The attempts on a node in the order of its queue, those with a slot first. Arrays are (attempts,)."""

    with_slot: int  # how many have one
    transfer: Floats  # s its payload yet needs of the link
    prompt_left: Floats  # tokens yet to prefill
    context: Floats  # tokens it holds
    time_left: Floats  # s to its deadline
    value: Floats
    output_left: Floats  # (samples, attempts): tokens yet to generate, in each sample of the future


class NodeState(NamedTuple):
    """A node's limits, its present speed, and its step table (see `step_table.StepTable`), idle power left out."""

    slots: int
    chunk: int  # prompt tokens prefilled per step
    frozen: float  # s it stands still from now on
    factor: float  # on the table's times after that
    base: Floats  # s of a decode step, by batch size
    slope: Floats  # s per context token held, by batch size
    watts: Floats  # of a decode step, by batch size
    prefill_tokens: Floats
    prefill_seconds: Floats
    prefill_watts: float


class Progress(NamedTuple):
    """How far the attempts are in one sample. Arrays are (attempts,)."""

    phase: NDArray[np.int64]
    output_left: Floats  # tokens
    context: Floats  # tokens
    arrival: Floats  # of its payload, s from now


class Batch(NamedTuple):
    """What the engine has to do."""

    decoding: int  # sequences
    context: float  # tokens they hold
    fewest_left: float  # steps until the first of them ends
    prefilling: int  # the attempt to prefill; −1: none
    next_change: float  # when a payload arrives or a deadline passes, s from now


class Steps(NamedTuple):
    """Engine steps in a row."""

    count: float
    seconds: float
    joules: float


def _compiled(function: F) -> F:
    return cast(F, numba.njit(cache=True)(function))


@_compiled
def _begin(attempts: Attempts, sample: int, progress: Progress, time: float) -> float:
    """Set `progress` to the present; returns when the link is free, s from now."""
    link_free = 0.0
    for j in range(len(progress.phase)):
        progress.output_left[j], progress.context[j] = attempts.output_left[sample, j], attempts.context[j]
        if j >= attempts.with_slot:
            progress.phase[j] = QUEUED
            continue
        link_free += attempts.transfer[j]
        progress.arrival[j] = link_free if attempts.transfer[j] > 0 else 0.0
        if progress.arrival[j] > time:
            progress.phase[j] = TRANSFERRING
        else:
            progress.phase[j] = PREFILLING if attempts.prompt_left[j] > 0 else DECODING
    return link_free


@_compiled
def _stop_late(attempts: Attempts, progress: Progress, time: float) -> int:
    """End the attempts whose deadline has passed; returns how many slots they give up."""
    given_up = 0
    for j in range(len(progress.phase)):
        if progress.phase[j] != OVER and attempts.time_left[j] <= time:
            given_up += progress.phase[j] != QUEUED
            progress.phase[j] = OVER
    return given_up


@_compiled
def _fill_slots(
    attempts: Attempts, progress: Progress, time: float, free: int, head: int, link_free: float
) -> tuple[int, int, float]:
    """Give the `free` slots to queued attempts, the next of which is `head`, and send their payloads one after the
    other. Returns free, head and link_free as they are then."""
    while head < len(progress.phase) and free > 0:
        if progress.phase[head] == QUEUED:
            link_free = max(link_free, time) + attempts.transfer[head]
            progress.phase[head], progress.arrival[head] = TRANSFERRING, link_free
            free -= 1
        head += 1
    return free, head, link_free


@_compiled
def _batch(attempts: Attempts, progress: Progress, time: float) -> Batch:
    """Let the payloads that are there be prefilled, and see what there is to do."""
    decoding, context, fewest_left, prefilling, next_change = 0, 0.0, math.inf, -1, math.inf
    for j in range(len(progress.phase)):
        if progress.phase[j] == TRANSFERRING:
            if progress.arrival[j] <= time:
                progress.phase[j] = PREFILLING
            else:
                next_change = min(next_change, progress.arrival[j])
        if progress.phase[j] == PREFILLING and prefilling < 0:
            prefilling = j
        if progress.phase[j] == DECODING:
            decoding, context = decoding + 1, context + progress.context[j]
            fewest_left = min(fewest_left, progress.output_left[j])
        if progress.phase[j] != QUEUED and progress.phase[j] != OVER:
            next_change = min(next_change, attempts.time_left[j])
    return Batch(decoding, context, fewest_left, prefilling, next_change)


@_compiled
def _prefill_seconds(node: NodeState, tokens: float) -> float:
    """As `StepTable.prefill`, on the present machine's arrays."""
    i = 1
    while i < len(node.prefill_tokens) - 1 and node.prefill_tokens[i] < tokens:
        i += 1
    seconds = node.prefill_seconds[i] - node.prefill_seconds[i - 1]
    slope = seconds / (node.prefill_tokens[i] - node.prefill_tokens[i - 1])
    return node.prefill_seconds[i - 1] + slope * (tokens - node.prefill_tokens[i - 1])


@_compiled
def _prefill(prompt: float, batch: Batch, node: NodeState) -> Steps:
    """All steps of one prompt, in each of which the others decode on."""
    count = math.ceil(prompt / node.chunk)
    prefill = _prefill_seconds(node, prompt / count)
    decode = 0.0
    if batch.decoding > 0:  # reading the weights is paid once
        decode = node.base[batch.decoding] + node.slope[batch.decoding] * batch.context
        prefill -= node.prefill_seconds[0]
    joules = decode * node.watts[batch.decoding] + prefill * node.prefill_watts
    return Steps(float(count), node.factor * count * (decode + prefill), node.factor * count * joules)


@_compiled
def _series(first: float, growth: float, count: float) -> float:
    """Seconds of `count` steps of which the first takes `first` and each next one `growth` more."""
    return count * first + growth * count * (count - 1) / 2


@_compiled
def _steps_within(first: float, growth: float, span: float) -> float:
    """The fewest steps (at least 1) that take `span` seconds or more."""
    if growth > 0:
        b = first - growth / 2
        count = math.ceil((math.sqrt(b * b + 2 * growth * span) - b) / growth)
    else:
        count = math.ceil(span / first)
    return max(count, 1.0)


@_compiled
def _decode(batch: Batch, node: NodeState, time: float) -> Steps:
    """Decode steps until a sequence ends, or the first that ends after the next change."""
    first = node.factor * (node.base[batch.decoding] + node.slope[batch.decoding] * batch.context)
    growth = node.factor * node.slope[batch.decoding] * batch.decoding
    span = max(batch.next_change - time, 0.0)
    count = batch.fewest_left
    if _series(first, growth, count) > span:
        count = min(_steps_within(first, growth, span), count)
    seconds = _series(first, growth, count)
    return Steps(count, seconds, seconds * node.watts[batch.decoding])


@_compiled
def _advance(
    attempts: Attempts, progress: Progress, time: float, steps: float, prefilled: int, value: float
) -> tuple[int, float]:
    """Count the tokens of `steps` steps that end at `time`: one each for what decodes, the first for what was
    prefilled. Returns how many attempts are done, and `value` with that of those on time."""
    done = 0
    for j in range(len(progress.phase)):
        if progress.phase[j] == DECODING:
            progress.output_left[j] -= steps
            progress.context[j] += steps
        elif j == prefilled:
            progress.phase[j] = DECODING
            progress.output_left[j] -= 1
            progress.context[j] += 1
        if progress.phase[j] == DECODING and progress.output_left[j] <= 0:
            progress.phase[j] = OVER
            done += 1
            if time <= attempts.time_left[j]:
                value += attempts.value[j]
    return done, value


@_compiled
def rollout(count: int, attempts: Attempts, node: NodeState) -> tuple[float, float]:
    """The on-time value and the J (idle apart) of the first `count` attempts, means over the samples.

    Payloads travel one after the other, those of queued attempts once they have a slot. An attempt stops at its
    deadline. A prompt is prefilled in one stretch.
    """
    value, joules = 0.0, 0.0
    samples = attempts.output_left.shape[0]
    progress = Progress(np.empty(count, np.int64), np.empty(count), np.empty(count), np.empty(count))
    for sample in range(samples):
        time, head = node.frozen, min(attempts.with_slot, count)
        free = node.slots - head
        link_free = _begin(attempts, sample, progress, time)
        while True:
            free += _stop_late(attempts, progress, time)
            free, head, link_free = _fill_slots(attempts, progress, time, free, head, link_free)
            batch = _batch(attempts, progress, time)
            if batch.prefilling >= 0:
                steps = _prefill(attempts.prompt_left[batch.prefilling], batch, node)
            elif batch.decoding > 0:
                steps = _decode(batch, node, time)
            elif not math.isinf(batch.next_change):
                time = batch.next_change
                continue
            else:
                break
            time += steps.seconds
            joules += steps.joules
            done, value = _advance(attempts, progress, time, steps.count, batch.prefilling, value)
            free += done
    return value / samples, joules / samples
