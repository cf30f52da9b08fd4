"""A node's near future, and what one more task would change in it.

Continuous batching gives every active sequence one token per step, so the number of steps taken from now on is the one
clock all of a node's work shares. A step here is one of each model that has work: they take turns, and each step is
paid. `forecast_nodes` walks along it in the bins of `csucb.token_bins`. In each bin every
task on the node is there with probability P(L > tokens by then | L > tokens so far), unless its deadline has passed;
tasks whose payload travels or that queue join on the way; the expected batch gives the time of a step (θ of the
step-cost model). Prompts are prefilled beside it, up to a chunk of tokens in a step, first come first served. The
result, an outlook per arm, maps steps to time, expected occupancy of the slots and the chance that no sequence of its
model is active.

`forecast_task` and `harm` then ask what one more task would do, without walking again: its own steps stretch the map by
a known amount, so its tokens by its deadline, the busy time it adds and the delay of everybody else follow from the map
and from running integrals of its length distribution.

A task of n answers to one prompt is n sequences that begin together, of lengths taken as independent: it is there while
the longest is. Where they are more than the node's slots they take turns: the others begin as the first ones end.

All of it is compiled; what is read and written is declared in `csucb.rows`. Times s, sizes tokens and bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.rows import (
    ArmRow,
    ClusterRows,
    InFlightRow,
    Ints,
    LengthsRow,
    NodeRow,
    OfferRow,
    OutlookRow,
    Records,
    ScoreRow,
    TaskRow,
)
from perllm.scheduler.csucb.token_bins import BINS, EDGES, Floats, at, position

#: A queued task gets its slot about when the expected number taken has fallen by this much below full.
_SLOT_MARGIN = 0.7
#: Tokens of a task when it is ready to be prefilled: it waits half a step, and has its first token a step later.
_BEFORE_FIRST = -0.5
#: Below this probability of still being there a task counts as over.
_NEGLIGIBLE = 1e-3
#: No step is believed to be shorter, s: the whole map must reach well beyond the moment a new task could arrive.
_SHORTEST_STEP = 5e-5
#: A task that costs another more than this share of its steps is looked at closely.
_MUCH = 0.2
#: Bins walked one by one; after them, two at a time.
_SINGLE_BINS = 8
_NEVER = 1e18


@compiled
def in_flight_on(cluster: ClusterRows, n: int) -> Records:
    """The tasks on the node in row `n`."""
    node: NodeRow = cluster.nodes[n]
    tasks: Records = cluster.in_flight[node.first : node.first + node.count]
    return tasks


@compiled
def steps_at(times: Floats, time: float) -> float:
    """The steps done by `time`: the inverse of the map `times` (BINS + 1,)."""
    if time <= times[0]:
        return 0.0
    if time >= times[BINS]:
        return float(EDGES[BINS])
    lo, hi = 0, BINS
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        if times[middle] <= time:
            lo = middle
        else:
            hi = middle
    span: float = times[hi] - times[lo]
    steps: float = EDGES[lo] + (EDGES[hi] - EDGES[lo]) * ((time - times[lo]) / span if span > 0 else 0.0)
    return steps


# --- several answers


@compiled
def width(node: NodeRow, task: TaskRow) -> float:
    """Answers of one more task in a node's batch at a time, at most."""
    return float(min(task.n, node.slots))


@compiled
def _turns(length: LengthsRow, n: float, wide: float, most: float) -> float:
    """Steps after which the last of n answers of up to `most` tokens begins, of which so many are there at a time."""
    return (n / wide - 1.0) * at(length.mean, most) if n > wide else 0.0


@compiled
def _all_over(length: LengthsRow, n: float, wide: float, most: float, steps: float) -> float:
    """P(n answers of up to `most` tokens are all over after so many steps), so many of them there at a time."""
    if n <= 1.0:
        return 1.0 if steps >= most else 1.0 - at(length.tail, steps)
    return _several_over(length, n, wide, most, steps)


@compiled
def _several_over(length: LengthsRow, n: float, wide: float, most: float, steps: float) -> float:
    if n <= wide:
        return 1.0 if steps >= most else (1.0 - at(length.tail, steps)) ** n
    mean, over = at(length.mean, most) / wide, 1.0
    for i in range(int(n)):
        mine = steps - max(0.0, i + 1.0 - wide) * mean
        if mine < most:
            over *= 1.0 - at(length.tail, max(0.0, mine))
    return over


@compiled
def _expected_steps(length: LengthsRow, n: float, wide: float, most: float) -> float:
    """Until all of them are over."""
    if n <= 1.0:
        return at(length.mean, most)
    end, total, k = _turns(length, n, wide, most) + most, 0.0, 0
    while k < BINS and EDGES[k] < end:
        last = min(end, EDGES[k + 1])
        total += (last - EDGES[k]) * (1.0 - _all_over(length, n, wide, most, (EDGES[k] + last) / 2))
        k += 1
    return total


@compiled
def _transfer(node: NodeRow, size: float) -> float:
    """Seconds from a claim until the payload is there."""
    return float(node.latency + size / node.bandwidth)


# --- a node with the tasks it holds


@compiled
def forecast_nodes(rows: Ints, cluster: ClusterRows) -> None:
    """Fill the outlooks of the nodes in `rows`, counted from their last change, and those of the tasks on them."""
    for n in rows:
        node: NodeRow = cluster.nodes[n]
        in_flight = in_flight_on(cluster, n)
        _catch_up(node, cluster.arms, in_flight)
        _condition_on_progress(in_flight, cluster.lengths)
        _walk(node, cluster.arms, in_flight, cluster.lengths, cluster.outlooks)
        _sum_up_arms(node, cluster.arms, in_flight, cluster.lengths)
        for i in range(len(in_flight)):
            _forecast_end(node, in_flight[i], cluster.lengths, cluster.outlooks)


@compiled
def _catch_up(node: NodeRow, arms: Records, in_flight: Records) -> None:
    """Bring the tasks from the node's last heartbeat to its last change: fills `ready`, `prefill_left`, `start` and
    `tokens`."""
    step_time = _decode_step(node, arms, in_flight)
    prefilled = _catch_up_prefills(node, arms, in_flight, step_time)
    for i in range(len(in_flight)):
        placed: InFlightRow = in_flight[i]
        if placed.start == 0.0:
            decoding = node.changed - placed.ready - (prefilled - placed.prefill_end)
            placed.tokens += max(0.0, decoding) / step_time


@compiled
def _idle_step(node: NodeRow, arms: Records) -> float:
    """What is taken for the time of a step in which no model has work, s: that of the first, with nobody in it."""
    return max(float(arms[node.first_arm].step), _SHORTEST_STEP)


@compiled
def _decode_step(node: NodeRow, arms: Records, in_flight: Records) -> float:
    """Time of a step with those that decode, s."""
    steps, rest = 0.0, 0.0
    for a in range(node.first_arm, node.first_arm + node.arms):
        arm: ArmRow = arms[a]
        works = False
        for i in range(len(in_flight)):
            placed: InFlightRow = in_flight[i]
            if placed.arm == a and placed.generated >= 1:
                each = arm.sequence + arm.context * (placed.prompt_tokens + placed.generated / placed.n)
                rest += placed.width * each
                works = True
        if works:
            steps += arm.step
    return max(steps, _SHORTEST_STEP if steps > 0.0 else _idle_step(node, arms)) + rest


@compiled
def _chunk_steps(arm: ArmRow, prompt: float) -> float:
    """Steps in which a prompt is prefilled, beyond the first."""
    return max(0.0, prompt / arm.chunk - 1.0)


@compiled
def _catch_up_prefills(node: NodeRow, arms: Records, in_flight: Records, step_time: float) -> float:
    """Prefills since the heartbeat, one after the other; returns the time they took, less that of the steps they were
    beside, s."""
    cursor, spent = node.heard, 0.0
    for i in range(len(in_flight)):
        placed: InFlightRow = in_flight[i]
        placed.ready, placed.prefill_left, placed.prefill_end = node.heard, 0.0, 0.0
        if placed.generated >= 1:
            placed.start, placed.tokens = 0.0, placed.generated / placed.width
            continue
        placed.ready, placed.prefill_left = _NEVER, placed.prompt_tokens
        placed.start, placed.tokens = -1.0, _BEFORE_FIRST
        arm: ArmRow = arms[placed.arm]
        own = max(arm.prefill, 1e-12)
        cost = own + step_time * _chunk_steps(arm, placed.prompt_tokens) / max(placed.prompt_tokens, 1.0)
        if placed.claimed <= 0:
            continue
        placed.ready = placed.claimed + _transfer(node, placed.payload_bytes)
        if placed.ready < node.heard:  # it had been in the engine at the heartbeat, still without a token
            done = (node.heard - placed.ready) / cost
            placed.prefill_left = max(0.1 * placed.prefill_left, placed.prefill_left - done)
        begun = max(cursor, placed.ready)
        if begun < node.changed:
            cursor = begun + placed.prefill_left * cost
            if cursor <= node.changed:
                spent += placed.prefill_left * own
                placed.start, placed.prefill_left, placed.ready, placed.prefill_end = 0.0, 0.0, cursor, spent
            else:
                spent += (node.changed - begun) / cost * own
                placed.prefill_left = (cursor - node.changed) / cost
    return spent


@compiled
def _condition_on_progress(in_flight: Records, lengths: Records) -> None:
    """Fill `survival` of those that decode: what P(it is there) must be multiplied by, given the tokens they have."""
    for i in range(len(in_flight)):
        placed: InFlightRow = in_flight[i]
        if placed.start == 0.0:
            length: LengthsRow = lengths[placed.lengths]
            last = _turns(length, placed.n, placed.width, placed.max_tokens) + placed.max_tokens
            placed.tokens = min(placed.tokens, last - 0.5)
            over = _all_over(length, placed.n, placed.width, placed.max_tokens, placed.tokens)
            placed.survival = 1.0 / max(1.0 - over, 1e-9)


@compiled
def _walk(node: NodeRow, arms: Records, in_flight: Records, lengths: Records, outlooks: Records) -> None:
    """Fill the node's outlooks, stretch by stretch of steps, and `start` of the tasks that join on the way."""
    first, count_arms = node.first_arm, node.arms
    arm: ArmRow = arms[first]
    expected = 0.0  # tasks that have yet to arrive, by then in the batch
    each = arm.sequence + arm.context * (node.arrival_prompt + node.arrival_output / 2)
    # The share of time that the prefills of those leave
    decoding = max(0.2, 1.0 - node.arrival_rate * node.arrival_prompt * arm.prefill)
    idle_step = _idle_step(node, arms)
    now, step, k = float(node.changed), idle_step, 0
    live, count = np.zeros(len(in_flight), np.int64), len(in_flight)  # those that may still be there, in order
    for i in range(count):
        live[i] = i
    idle_of, queued, apart = np.zeros(count_arms), np.zeros(count_arms), np.zeros(count_arms)
    for m in range(count_arms):
        outlooks[first + m].prefilled = 0.0
    while k < BINS:
        last = k + 1 if k < _SINGLE_BINS else k + 2
        lo, hi = EDGES[k], EDGES[last]
        width = hi - lo
        count, held, idle, context, rest = _batch(
            node, arms, in_flight, lengths, live, count, now, lo, hi, step, idle_of, queued, outlooks
        )
        prefill, steps = 0.0, idle_step * idle
        for m in range(count_arms):
            done = min(queued[m], arms[first + m].chunk * width)
            queued[m] -= done
            prefill += done * arms[first + m].prefill
            steps += arms[first + m].step * (1.0 - idle_of[m])
        step = (idle_step if count_arms == 1 else max(steps, _SHORTEST_STEP)) + rest + expected * each
        spent = prefill + step * width
        # Those that arrive: as many as usual, while there is room for them
        stay = math.exp(-width / node.arrival_output)
        room = min(node.slots - held, (arm.kv_tokens - context) / (node.arrival_prompt + node.arrival_output))
        fit = max(0.0, room - expected * stay) / (node.arrival_output * (1.0 - stay)) * width
        arrived = min(node.arrival_rate * spent / decoding, fit)
        spent += arrived * node.arrival_prompt * arm.prefill
        for m in range(count_arms):
            outlook: OutlookRow = outlooks[first + m]
            more = 0.0
            if count_arms > 1:  # in the steps its model would not be in
                more = max(0.0, arms[first + m].step * idle_of[m] - idle_step * idle) * width
            idle_here = idle_of[m] * math.exp(-expected / count_arms)
            begun, end = now + apart[m], spent + more
            for e in range(k, last):
                outlook.times[e] = begun + end * ((EDGES[e] - lo) / width)
                outlook.taken[e], outlook.idle[e] = held, idle_here
            apart[m] += more
        now += spent
        expected = expected * stay + arrived / width * node.arrival_output * (1.0 - stay)
        k = last
    for m in range(count_arms):
        outlooks[first + m].times[BINS] = now + apart[m]


@compiled
def _batch(
    node: NodeRow,
    arms: Records,
    in_flight: Records,
    lengths: Records,
    live: Ints,
    count: int,
    now: float,
    lo: float,
    hi: float,
    step: float,
    idle_of: Floats,
    queued: Floats,
    outlooks: Records,
) -> tuple[int, float, float, float, float]:
    """The expected batch from step `lo` to `hi`, which begins at `now` with steps of about `step` s.

    Returns how many of the first `count` in `live` may still be there afterwards (moved to the front), slots taken,
    P(no sequence active), context tokens held, and s that sequences and their context add to each step. Fills
    `idle_of`, P(no sequence of a model active), and adds to `queued`, prompt tokens to be prefilled, and `prefilled` of
    the outlooks.
    """
    span = step * (hi - lo)  # about the time this stretch takes
    per_span, per_width = 1.0 / span, 1.0 / (hi - lo)
    held, idle, context, rest = 0.0, 1.0, 0.0, 0.0
    first, kept = node.first_arm, 0
    idle_of[:] = 1.0
    for j in range(count):
        placed: InFlightRow = in_flight[live[j]]
        if placed.deadline <= now:  # over, one way or another
            if placed.start < 0:
                placed.start = _NEVER
            continue
        m = placed.arm - first
        arm: ArmRow = arms[placed.arm]
        begin = lo
        if placed.start < 0:
            if placed.ready >= _NEVER and held <= node.slots - _SLOT_MARGIN:
                claim = max(now, placed.dispatched + node.dispatch_delay)
                placed.ready = claim + _transfer(node, placed.payload_bytes)
            if placed.ready >= now + span:
                held += placed.width
                live[kept], kept = live[j], kept + 1
                continue
            begin = min(hi, lo + max(0.0, placed.ready - now) / step)
            queued[m] += placed.prefill_left
            done = max(begin + placed.prefill_left / arm.chunk, lo + queued[m] / arm.chunk)
            outlook: OutlookRow = outlooks[placed.arm]
            outlook.prefilled = max(outlook.prefilled, done)
            placed.start, placed.survival = max(begin, done - 1.0), 1.0
        length: LengthsRow = lengths[placed.lengths]
        tokens = placed.tokens + max(0.0, (max(begin, placed.start) + hi) / 2 - placed.start)
        alive = 1.0 - _all_over(length, placed.n, placed.width, placed.max_tokens, tokens)
        alive *= placed.survival
        if alive < _NEGLIGIBLE:
            continue
        answers = alive
        if placed.n > 1.0:
            tokens = max(0.0, tokens - _turns(length, placed.n, placed.width, placed.max_tokens))
            answers = placed.width * at(length.tail, tokens) * placed.survival
        live[kept], kept = live[j], kept + 1
        held += answers
        # The part of the stretch it is there
        part = (hi - begin) * per_width * min(1.0, (placed.deadline - now) * per_span)
        idle *= 1.0 - alive * part
        idle_of[m] *= 1.0 - alive * part
        holds = answers * part * (placed.prompt_tokens + tokens)
        context += holds
        rest += answers * part * arm.sequence + arm.context * holds
    return kept, held, idle, context, rest


@compiled
def _sum_up_arms(node: NodeRow, arms: Records, in_flight: Records, lengths: Records) -> None:
    """Fill `bytes_coming` of the node and `kv_used` of its arms."""
    node.bytes_coming = 0.0
    for i in range(len(in_flight)):
        arms[in_flight[i].arm].kv_used = 0.0
    for i in range(len(in_flight)):
        placed: InFlightRow = in_flight[i]
        if placed.start != 0.0:
            node.bytes_coming += placed.payload_bytes
        if placed.max_tokens >= 1:
            length: LengthsRow = lengths[placed.lengths]
            tokens = placed.tokens - _turns(length, placed.n, placed.width, placed.max_tokens)
            each = max(at(length.mean, placed.max_tokens), tokens)
            arms[placed.arm].kv_used += placed.prompt_tokens + placed.width * each


@compiled
def _forecast_end(node: NodeRow, placed: InFlightRow, lengths: Records, outlooks: Records) -> None:
    """Fill `end_step`, `end_step_time` and `p_on_time` of a task on the node."""
    placed.p_on_time = 0.0
    if placed.start < 0 or placed.start >= _NEVER:
        return
    outlook: OutlookRow = outlooks[placed.arm]
    end = steps_at(outlook.times, placed.deadline - node.dispatch_delay)
    k, _ = position(end)
    step_time = (outlook.times[k + 1] - outlook.times[k]) / (EDGES[k + 1] - EDGES[k])
    placed.end_step, placed.end_step_time = end, max(step_time, 1e-12)
    placed.p_on_time = _p_done(placed, lengths, end - placed.start)


@compiled
def _p_done(placed: InFlightRow, lengths: Records, steps: float) -> float:
    """P(a task is done so many steps after its `start`)."""
    if steps <= 0:
        return 0.0
    over = _all_over(lengths[placed.lengths], placed.n, placed.width, placed.max_tokens, placed.tokens + steps)
    return float(max(0.0, 1.0 - (1.0 - over) * placed.survival))


# --- one more task


class _Own(NamedTuple):
    """What one more task costs, s."""

    prefill: float
    chunks: float  # steps in which its prompt is prefilled
    per_token: float
    context: float  # by which that grows per token
    width: float  # answers at a time
    turns: float  # steps after which the last of them begins
    mean: float  # tokens of an answer


@compiled
def forecast_task(
    node: NodeRow,
    arm: ArmRow,
    outlook: OutlookRow,
    task: TaskRow,
    now: float,
    after_waiting: float,
    lengths: Records,
    score: ScoreRow,
) -> None:
    """What a node would make of one more task on one of its arms: fills `finish`, `p_on_time`, `p_later`, `busy`,
    `joules` and `stay` of `score`. Of the time it has now it has `after_waiting` s left if it waits."""
    length: LengthsRow = lengths[task.lengths]
    late = _idle_for(node, outlook, now)
    joined, arrives = _joins(node, outlook, now - late, task.payload_bytes)
    end = task.deadline - node.dispatch_delay - late
    own = _own_cost(node, arm, task, length)
    start = _starts(outlook, own, joined)
    ready = arrives + own.prefill + at(outlook.times, start) - at(outlook.times, joined)  # for its first token

    steps = _steps_by(outlook.times, start, ready, own, length, end)
    score.p_on_time, score.p_later = _chance(own, task, length, steps), 0.0
    if after_waiting > 0.0:
        then = end - (task.deadline - now) + after_waiting
        score.p_later = _chance(own, task, length, _steps_by(outlook.times, start, ready, own, length, then))
    usual = _expected_steps(length, task.n, own.width, task.max_tokens) - _BEFORE_FIRST
    done = ready + at(outlook.times, start + usual) - at(outlook.times, start) + _own_time(own, length, usual)

    spent = min(max(steps, 0.0), own.turns + task.max_tokens)
    busy = min(own.prefill, max(0.0, end - arrives))
    busy += arm.step * _idle_at(outlook, joined) * min(start - joined, max(0.0, steps_at(outlook.times, end) - joined))
    busy += _busy_added(arm, outlook, task, own, start, spent, length)
    score.stay = max(0.0, min(done, end) - arrives + _transfer(node, task.payload_bytes))
    score.finish = max(0.0, done - now + late)
    score.busy, score.joules = busy, busy * node.watts + task.payload_bytes * node.joules_per_byte


@compiled
def _idle_at(outlook: OutlookRow, steps: float) -> float:
    """P(no sequence of its model is active) after so many steps."""
    k, _ = position(steps)
    return float(outlook.idle[k])


@compiled
def _chance(own: _Own, task: TaskRow, length: LengthsRow, steps: float) -> float:
    """P(it is done after so many steps)."""
    if steps + _BEFORE_FIRST < 0:
        return 0.0
    return max(0.0, _all_over(length, task.n, own.width, task.max_tokens, steps + _BEFORE_FIRST))


@compiled
def _busy_added(
    arm: ArmRow,
    outlook: OutlookRow,
    task: TaskRow,
    own: _Own,
    start: float,
    spent: float,
    length: LengthsRow,
) -> float:
    """Busy time a task adds by decoding, s: of the `spent` steps it takes from step `start` on, its part of each, and
    the whole step where no other sequence of its model is active."""
    busy = _answers_time(own, length, spent)
    k, _ = position(start)
    u, before = 0.0, 0.0
    while u < spent:
        begun, u = u, min(spent, EDGES[k + 1] - start) if k < BINS - 1 else spent
        if task.n > 1.0:
            there = 1.0 - _all_over(length, task.n, own.width, task.max_tokens, (begun + u) / 2)
            after = before + (u - begun) * there
        else:
            after = at(length.mean, u)
        busy += arm.step * outlook.idle[k] * (after - before)
        before, k = after, k + 1
    return float(busy)


@compiled
def harm(cluster: ClusterRows, offer: OfferRow, task: TaskRow, now: float) -> float:
    """Expected on-time value that the tasks on a node lose to one more."""
    node: NodeRow = cluster.nodes[offer.node]
    arm: ArmRow = cluster.arms[offer.arm]
    in_flight, lengths, outlook = in_flight_on(cluster, offer.node), cluster.lengths, cluster.outlooks[offer.arm]
    if len(in_flight) == 0:
        return 0.0
    length: LengthsRow = lengths[task.lengths]
    joined, _ = _joins(node, outlook, now, task.payload_bytes)
    own = _own_cost(node, arm, task, length)
    start = _starts(outlook, own, joined)
    lost, begins = 0.0, arm.step * _idle_at(outlook, joined)  # its model's step, where that would have none
    for i in range(len(in_flight)):
        placed: InFlightRow = in_flight[i]
        if placed.p_on_time <= 0.0 or placed.end_step <= joined:
            continue
        extra = begins if placed.arm != offer.arm else 0.0
        steps = placed.end_step - joined  # until its deadline, if they were not delayed
        short = _delay(own, task, length, joined, start, extra, steps) / placed.end_step_time
        if short > _MUCH * steps:  # then they share fewer
            low, high = max(0.0, steps - short), steps
            for _ in range(4):
                middle = (low + high) / 2
                short = _delay(own, task, length, joined, start, extra, middle) / placed.end_step_time
                if middle > steps - short:
                    high = middle
                else:
                    low = middle
            short = steps - (low + high) / 2
        left = _p_done(placed, lengths, placed.end_step - placed.start - short)
        lost += placed.value * max(0.0, placed.p_on_time - left)
    return lost


@compiled
def _delay(
    own: _Own, task: TaskRow, length: LengthsRow, joined: float, start: float, extra: float, steps: float
) -> float:
    """What a task that joins after `joined` steps and starts to decode after `start` adds to the first `steps` from
    then on, s; `extra` to each step it is in."""
    decoding = min(max(0.0, joined + steps - start), own.turns + task.max_tokens)
    delay = own.prefill * min(1.0, steps / (start - joined + 1.0)) + _answers_time(own, length, decoding)
    return delay + extra * (min(steps, start - joined) + at(length.mean, decoding))


@compiled
def p_on_time_alone(node: NodeRow, arm: ArmRow, task: TaskRow, now: float, lengths: Records) -> float:
    """P(on time) if the node had nothing else to do."""
    wide = width(node, task)
    per_step = arm.step + wide * (arm.sequence + arm.context * task.prompt_tokens)
    growth = wide * arm.context
    left = task.deadline - now - 2 * node.dispatch_delay - _transfer(node, task.payload_bytes)
    left -= arm.prefill * task.prompt_tokens + arm.step * _chunk_steps(arm, task.prompt_tokens)
    if left <= 0:
        return 0.0
    # per_step·u + growth/2·u² = left
    steps = 2 * left / (per_step + math.sqrt(per_step * per_step + 2 * growth * left))
    return _all_over(lengths[task.lengths], task.n, wide, task.max_tokens, steps + _BEFORE_FIRST)


@compiled
def kv_needed(node: NodeRow, task: TaskRow, lengths: Records) -> float:
    """Tokens of KV cache the task will probably hold: its prompt once, and its answers. What is embedded is not kept
    from step to step."""
    if task.max_tokens < 1:
        return 0.0
    return float(task.prompt_tokens + width(node, task) * at(lengths[task.lengths].mean, task.max_tokens))


@compiled
def _own_cost(node: NodeRow, arm: ArmRow, task: TaskRow, length: LengthsRow) -> _Own:
    wide, most = width(node, task), task.max_tokens
    return _Own(
        arm.prefill * task.prompt_tokens,
        task.prompt_tokens / arm.chunk,
        arm.sequence + arm.context * task.prompt_tokens,
        arm.context,
        wide,
        _turns(length, task.n, wide, most),
        at(length.mean, most),
    )


@compiled
def _answers_time(own: _Own, length: LengthsRow, steps: float) -> float:
    """What its answers are expected to add to so many steps, s."""
    full = min(steps, own.turns)  # others wait for their turn: all places are taken
    steps -= full
    tokens = full + at(length.mean, steps)
    return own.width * (own.per_token * tokens + own.context * (full * own.mean / 2 + at(length.moment, steps)))


@compiled
def _own_time(own: _Own, length: LengthsRow, steps: float) -> float:
    """What it adds to so many steps if it is there in all of them, s: one answer is, the others as expected."""
    time = (own.per_token + own.context / 2 * steps) * steps
    return time if own.width <= 1.0 else time + (1.0 - 1.0 / own.width) * _answers_time(own, length, steps)


@compiled
def _idle_for(node: NodeRow, outlook: OutlookRow, now: float) -> float:
    """Seconds an empty node has idled since its outlook was made: its clock waits, so the map still holds, shifted."""
    return max(0.0, now - outlook.times[0]) if node.count == 0 else 0.0


@compiled
def _joins(node: NodeRow, outlook: OutlookRow, now: float, size: float) -> tuple[float, float]:
    """After how many steps, and when, a task decided now would be ready to be prefilled."""
    claim = now + node.dispatch_delay
    if node.taken >= node.slots:
        k, _ = position(steps_at(outlook.times, claim))
        while k < BINS - 1 and outlook.taken[k] > node.slots - _SLOT_MARGIN:
            k += 1
        claim = max(claim, outlook.times[k])
    arrives = claim + _transfer(node, size)
    return steps_at(outlook.times, arrives), arrives


@compiled
def _starts(outlook: OutlookRow, own: _Own, joined: float) -> float:
    """After how many steps a task that joins after so many starts to decode: prompts before its own are prefilled
    first, and then its own, chunk by chunk; the last chunk's step gives it its first token."""
    return max(joined, max(joined, outlook.prefilled) + own.chunks - 1.0)


@compiled
def _steps_by(times: Floats, start: float, ready: float, own: _Own, length: LengthsRow, end: float) -> float:
    """Steps (≥ 0) a task that starts to decode after `start` steps, at `ready`, has taken by `end`, or −1 if it has
    not started.

    Its u-th step ends at ready + times(start + u) − times(start) + what it adds to u steps.
    """
    if ready > end:
        return -1.0
    shift = ready - at(times, start)
    k, _ = position(start)
    lo, hi = k, BINS  # lo: the last edge at which there is still time
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        u = EDGES[middle] - start
        if times[middle] + shift + _own_time(own, length, u) <= end:
            lo = middle
        else:
            hi = middle
    u0, u1 = max(0.0, EDGES[lo] - start), EDGES[lo + 1] - start
    t0 = at(times, start + u0) + shift + _own_time(own, length, u0)
    t1 = times[lo + 1] + shift + _own_time(own, length, u1)
    return float(u0 + (u1 - u0) * min(1.0, max(0.0, (end - t0) / (t1 - t0))) if t1 > t0 else u0)
