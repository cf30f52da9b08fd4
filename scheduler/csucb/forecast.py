"""What a node's near future looks like, and what one more task would change in it: the compiled heart of the core.

Continuous batching gives every active sequence one token per step, so the number of steps taken from now on is the one
clock all of a node's work shares. `predict` walks along it in the bins of the token grid. In each bin every task on the
node is expected to be there with probability P(L > tokens by then | L > tokens so far), unless its deadline has passed;
tasks that travel or queue join on the way; the expected batch gives the time of a step (θ of the speed model). What
results is a map from steps to time, with the expected occupancy of the slots and the chance that nobody is active.

`weigh` and `harm` then ask what one more task would do, without walking again: its own steps stretch the map by a known
amount, so its tokens by its deadline, the busy time it adds, and the delay of everybody else follow from the map and
from running integrals of its length distribution.

Arrays are plain float64 with a named column each; times s, sizes tokens and bytes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.csucb.compiled import compiled
from perllm.scheduler.csucb.output_lengths import MEAN, MOMENT, TAIL
from perllm.scheduler.csucb.token_bins import BINS, EDGES, Floats, at, position

Matrix = NDArray[np.float64]
Cube = NDArray[np.float64]

#: Columns of `nodes` (one row per node): where its in_flight are in `in_flight` and how many; its slots; when it was last
#: heard of and last changed; W while it steps, beyond idle; J/byte, bytes/s and s of its link; s from a decision to
#: its queue; 1 if it stands still; its first row in `arms`; tasks/s that usually come, and their mean prompt and
#: output; price of a second in a slot; tasks/s its slots can finish. `predict` fills the fixed time of its steps and
#: the bytes that travel to it.
FIRST, COUNT, SLOTS, HEARD, ANCHOR, WATTS, JOULES_PER_BYTE, RATE, LATENCY, HOP, STILL, ARM_ROW = range(12)
INFLOW, IN_PROMPT, IN_TOKENS, TOLL, PACE, FIXED, COMING, NODE_COLUMNS = range(12, 20)
#: Columns of `in_flight` (one row per task on a node), in order of dispatch. Given are: when it was sent and claimed (0:
#: not yet), tokens generated as of the last heartbeat, …, the row of its length distribution, its arm. `predict`
#: fills: when its payload is there, prompt tokens left to prefill, the step at which it starts to decode (−1: not in
#: the batch yet), its tokens at that step, 1 / P(L > those), the step and the time of a step at its deadline, and
#: P(on time).
SENT, CLAIMED, GENERATED, PROMPT, BYTES, DEADLINE, MOST, VALUE, LENGTH, ARM = range(10)
READY, LEFT, START, TOKENS, WEIGHT, LAST, STEP, P, FLIGHT_COLUMNS = range(10, 19)
#: Columns of `arms` (one row per model on a node): the cost of a step (see `perllm.scheduler.csucb.step_cost`), its σ as a share of
#: it, the tokens its KV cache holds, and those its tasks will probably need (filled by `predict`).
A, B, C, D, SPREAD, KV, KV_USED, ARM_COLUMNS = range(8)
#: Planes of `maps` (planes, nodes, BINS + 1): time (s) at which so many steps are done; expected slots taken or queued
#: for, and chance that nobody is active, in the bin that begins there.
TIME, TAKEN, ALONE = range(3)

#: A queued task gets its slot about when the expected number taken has fallen by this much below full.
_SLOT_MARGIN = 0.7
#: Tokens of a task when it is ready to be prefilled: it waits half a step, and has its first token a step later.
_BEFORE_FIRST = -0.5
#: Below this chance a task is as good as over.
_LITTLE = 1e-3
#: No step is believed to be shorter, s: the whole map must reach well beyond the moment a new task could arrive.
_FASTEST = 5e-5
#: Bins walked one by one; after them, two at a time.
_FINE = 8
_NEVER = 1e18


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


@compiled
def _catch_up(node: Floats, arms: Matrix, in_flight: Matrix) -> None:
    """Bring the in_flight from the node's last heartbeat to its last change: fills READY, LEFT, START and TOKENS."""
    heard, anchor = node[HEARD], node[ANCHOR]
    fixed, rest = max(node[FIXED], _FASTEST), 0.0  # of the time of a step
    for i in range(len(in_flight)):
        flight = in_flight[i]
        arm = arms[int(flight[ARM])]
        fixed = max(fixed, arm[A])
        if flight[GENERATED] >= 1:
            rest += arm[B] + arm[D] * (flight[PROMPT] + flight[GENERATED])
    node[FIXED] = fixed
    # Prefills since the heartbeat, one after the other. LAST holds, for now, the time they had taken when it began.
    cursor, spent = heard, 0.0
    for i in range(len(in_flight)):
        flight = in_flight[i]
        flight[READY], flight[LEFT], flight[LAST] = heard, 0.0, 0.0
        if flight[GENERATED] >= 1:
            flight[START], flight[TOKENS] = 0.0, flight[GENERATED]
            continue
        flight[READY], flight[LEFT] = _NEVER, flight[PROMPT]
        flight[START], flight[TOKENS] = -1.0, _BEFORE_FIRST
        cost = max(arms[int(flight[ARM]), C], 1e-12)
        if flight[CLAIMED] <= 0:
            continue
        flight[READY] = flight[CLAIMED] + _travel(node, flight[BYTES])
        if flight[READY] < heard:  # it had been in the engine at the heartbeat, still without a token
            flight[LEFT] = max(0.1 * flight[LEFT], flight[LEFT] - (heard - flight[READY]) / cost)
        begun = max(cursor, flight[READY])
        if begun < anchor:
            cursor = begun + flight[LEFT] * cost
            if cursor <= anchor:
                spent += flight[LEFT] * cost
                flight[START], flight[LEFT], flight[READY], flight[LAST] = 0.0, 0.0, cursor, spent
            else:
                spent += anchor - begun
                flight[LEFT] = (cursor - anchor) / cost
    for i in range(len(in_flight)):
        flight = in_flight[i]
        if flight[START] == 0.0:
            decoding = anchor - flight[READY] - (spent - flight[LAST])
            flight[TOKENS] += max(0.0, decoding) / (fixed + rest)


@compiled
def _travel(node: Floats, size: float) -> float:
    """Seconds from a claim until the payload is there."""
    return float(node[LATENCY] + size / node[RATE])


@compiled
def predict(  # noqa: PLR0915 (one walk along one node's future)
    n: int, nodes: Matrix, arms: Matrix, all_flights: Matrix, table: Cube, maps: Cube
) -> None:
    """Fill node `n`'s map from steps to time, counted from its last change, and its in_flight' outlook."""
    node = nodes[n]
    first, count = int(node[FIRST]), int(node[COUNT])
    in_flight = all_flights[first : first + count]
    times, taken, alone = maps[TIME, n], maps[TAKEN, n], maps[ALONE, n]
    _catch_up(node, arms, in_flight)
    fixed = node[FIXED]

    for i in range(count):
        flight = in_flight[i]
        if flight[START] == 0.0:
            flight[TOKENS] = min(flight[TOKENS], flight[MOST] - 0.5)
            flight[WEIGHT] = 1.0 / max(at(table[int(flight[LENGTH]), TAIL], flight[TOKENS]), 1e-9)

    arm = arms[int(node[ARM_ROW])]
    crowd = 0.0  # tasks that have yet to arrive, by then in the batch
    each = arm[B] + arm[D] * (node[IN_PROMPT] + node[IN_TOKENS] / 2)
    pure = max(0.2, 1.0 - node[INFLOW] * node[IN_PROMPT] * arm[C])  # the share of time their prefills leave
    now, step, k = float(node[ANCHOR]), float(fixed), 0
    live, left = np.arange(count), count  # in_flight that may still be there, in order
    while k < BINS:
        last = k + 1 if k < _FINE else k + 2
        lo, hi = EDGES[k], EDGES[last]
        width = hi - lo
        span = step * width  # about the time this stretch takes
        per_span, per_width = 1.0 / span, 1.0 / width
        held, nobody, prefill, rest = 0.0, 1.0, 0.0, 0.0
        kept = 0
        for j in range(left):
            flight = in_flight[live[j]]
            if flight[DEADLINE] <= now:  # over, one way or another
                if flight[START] < 0:
                    flight[START] = _NEVER
                continue
            arm = arms[int(flight[ARM])]
            begin = lo
            if flight[START] < 0:
                if flight[READY] >= _NEVER and held <= node[SLOTS] - _SLOT_MARGIN:
                    flight[READY] = max(now, flight[SENT] + node[HOP]) + _travel(node, flight[BYTES])
                if flight[READY] >= now + span:
                    held += 1.0
                    live[kept], kept = live[j], kept + 1
                    continue
                begin = min(hi, lo + max(0.0, flight[READY] - now) / step)
                prefill += flight[LEFT] * arm[C]
                flight[START], flight[WEIGHT] = begin, 1.0
            tokens = flight[TOKENS] + (begin + hi) / 2 - flight[START]
            alive = at(table[int(flight[LENGTH]), TAIL], tokens) * flight[WEIGHT] if tokens < flight[MOST] else 0.0
            if alive < _LITTLE:
                continue
            live[kept], kept = live[j], kept + 1
            held += alive
            # The part of the stretch it is there
            alive *= (hi - begin) * per_width * min(1.0, (flight[DEADLINE] - now) * per_span)
            nobody *= 1.0 - alive
            rest += alive * (arm[B] + arm[D] * (flight[PROMPT] + tokens))
        left = kept
        step = fixed + rest + crowd * each
        spent = (prefill + step * width) / pure
        for e in range(k, last):
            times[e] = now + spent * ((EDGES[e] - lo) / width)
            taken[e], alone[e] = held, nobody * math.exp(-crowd)
        now += spent
        stay = math.exp(-width / node[IN_TOKENS])
        crowd = crowd * stay + node[INFLOW] * spent / width * node[IN_TOKENS] * (1.0 - stay)
        crowd = min(crowd, max(0.0, node[SLOTS] - held))
        k = last
    times[BINS] = now

    node[COMING] = 0.0
    for i in range(count):
        arms[int(in_flight[i, ARM]), KV_USED] = 0.0
    for i in range(count):
        flight = in_flight[i]
        if flight[START] != 0.0:
            node[COMING] += flight[BYTES]
        expected = at(table[int(flight[LENGTH]), MEAN], flight[MOST])
        arms[int(flight[ARM]), KV_USED] += flight[PROMPT] + max(expected, flight[TOKENS])
        flight[P] = 0.0
        if flight[START] < 0 or flight[START] >= _NEVER:
            continue
        end = steps_at(times, flight[DEADLINE] - node[HOP])
        k, _ = position(end)
        flight[LAST] = end
        flight[STEP] = max((times[k + 1] - times[k]) / (EDGES[k + 1] - EDGES[k]), 1e-12)
        flight[P] = _done(table, flight, end - flight[START])


@compiled
def _done(table: Cube, flight: Floats, steps: float) -> float:
    """P(a flight is done after `steps` steps from its START)."""
    if steps <= 0:
        return 0.0
    tokens = flight[TOKENS] + steps
    if tokens >= flight[MOST]:
        return 1.0
    return float(max(0.0, 1.0 - at(table[int(flight[LENGTH]), TAIL], tokens) * flight[WEIGHT]))


#: What `weigh` fills in for one node: s from now until the task is probably done, P(on time), busy seconds and joules
#: it adds, s it is in a slot. Whoever asks fills what that costs, on-time value other tasks lose, the index, and the
#: slack of each constraint.
FINISH, CHANCE, BUSY, JOULES, STAY, TOLL_PAID, HARM, INDEX = range(8)
C_DEADLINE, C_COMPUTE, C_MEMORY, C_BANDWIDTH, LOOK_COLUMNS = range(8, 13)
#: A task before it is placed: prompt tokens, payload bytes, deadline (s), most tokens, value, row of its lengths.
T_PROMPT, T_BYTES, T_DEADLINE, T_MOST, T_VALUE, T_LENGTH, TASK_COLUMNS = range(7)


@compiled
def weigh(
    node: Floats,
    arm: Floats,
    task: Floats,
    now: float,
    table: Cube,
    times: Floats,
    taken: Floats,
    alone: Floats,
    look: Floats,
) -> None:
    """What a node would make of one more task on one of its arms: fills FINISH, CHANCE, BUSY and JOULES of `look`."""
    row = table[int(task[T_LENGTH])]
    prompt, most = task[T_PROMPT], task[T_MOST]
    late = _idle_for(node, times, now)
    joined, arrives = _joins(node, times, taken, now - late, task[T_BYTES])
    end = task[T_DEADLINE] - node[HOP] - late
    per_step, growth, prefill = _own_cost(node, arm, prompt)

    steps = _steps_by(times, joined, arrives, prefill, per_step, growth, end)
    chance = 0.0
    if steps >= 0:
        tokens = steps + _BEFORE_FIRST
        chance = 1.0 if tokens >= most else 1.0 - at(row[TAIL], tokens)
    usual = at(row[MEAN], most) - _BEFORE_FIRST
    done = arrives + prefill + at(times, joined + usual) - at(times, joined) + (per_step + growth * usual) * usual

    # Busy time added: its prefill, its part of each step, and the whole step where it would be alone
    spent = min(max(steps, 0.0), most)
    busy = min(prefill, max(0.0, end - arrives))
    busy += (arm[B] + arm[D] * prompt) * at(row[MEAN], spent) + arm[D] * at(row[MOMENT], spent)
    k, _ = position(joined)
    u, before = 0.0, 0.0
    while u < spent:
        u = min(spent, EDGES[k + 1] - joined) if k < BINS - 1 else spent
        after = at(row[MEAN], u)
        busy += arm[A] * alone[k] * (after - before)
        before, k = after, k + 1
    look[STAY] = max(0.0, min(done, end) - arrives + _travel(node, task[T_BYTES]))
    look[FINISH], look[CHANCE] = max(0.0, done - now + late), max(0.0, chance)
    look[BUSY], look[JOULES] = busy, busy * node[WATTS] + task[T_BYTES] * node[JOULES_PER_BYTE]


@compiled
def harm(
    node: Floats, arm: Floats, task: Floats, now: float, in_flight: Matrix, table: Cube, times: Floats, taken: Floats
) -> float:
    """Expected on-time value that the `in_flight` on a node lose to one more task."""
    if len(in_flight) == 0:
        return 0.0
    row = table[int(task[T_LENGTH])]
    joined, _ = _joins(node, times, taken, now, task[T_BYTES])
    per_step, _, prefill = _own_cost(node, arm, task[T_PROMPT])
    lost = 0.0
    for i in range(len(in_flight)):
        flight = in_flight[i]
        if flight[P] <= 0.0 or flight[LAST] <= joined:
            continue
        together = min(flight[LAST] - joined, task[T_MOST])
        delay = prefill + per_step * at(row[MEAN], together) + arm[D] * at(row[MOMENT], together)
        left = _done(table, flight, flight[LAST] - flight[START] - delay / flight[STEP])
        lost += flight[VALUE] * max(0.0, flight[P] - left)
    return lost


@compiled
def chance_alone(node: Floats, arm: Floats, task: Floats, now: float, table: Cube) -> float:
    """P(on time) if the node had nothing else to do."""
    per_step = arm[A] + arm[B] + arm[D] * task[T_PROMPT]
    left = task[T_DEADLINE] - now - 2 * node[HOP] - _travel(node, task[T_BYTES]) - arm[C] * task[T_PROMPT]
    if left <= 0:
        return 0.0
    # per_step·u + D/2·u² = left
    steps = 2 * left / (per_step + math.sqrt(per_step * per_step + 2 * arm[D] * left))
    tokens = steps + _BEFORE_FIRST
    return 1.0 if tokens >= task[T_MOST] else 1.0 - at(table[int(task[T_LENGTH]), TAIL], tokens)


@compiled
def _own_cost(node: Floats, arm: Floats, prompt: float) -> tuple[float, float, float]:
    """What a task adds to every step it is in, by how much that grows per step (halved), and its prefill, s."""
    return arm[B] + max(0.0, arm[A] - node[FIXED]) + arm[D] * prompt, arm[D] / 2, arm[C] * prompt


@compiled
def _idle_for(node: Floats, times: Floats, now: float) -> float:
    """Seconds an empty node has idled since its map was made: its clock waits, so the map still holds, shifted."""
    return max(0.0, now - times[0]) if node[COUNT] == 0 else 0.0


@compiled
def _joins(node: Floats, times: Floats, taken: Floats, now: float, size: float) -> tuple[float, float]:
    """After how many steps, and when, a task decided now would be ready to be prefilled."""
    claim = now + node[HOP]
    if node[COUNT] >= node[SLOTS]:
        k, _ = position(steps_at(times, claim))
        while k < BINS - 1 and taken[k] > node[SLOTS] - _SLOT_MARGIN:
            k += 1
        claim = max(claim, times[k])
    arrives = claim + _travel(node, size)
    return steps_at(times, arrives), arrives


@compiled
def _steps_by(
    times: Floats, joined: float, arrives: float, prefill: float, per_step: float, growth: float, end: float
) -> float:
    """Steps (≥ 0) a task that joins after `joined` steps has taken by `end`, or −1 if not even its prefill is over.

    Its u-th step ends at times(joined + u) + prefill + per_step·u + growth·u².
    """
    if arrives + prefill > end:
        return -1.0
    shift = arrives - at(times, joined) + prefill
    k, _ = position(joined)
    lo, hi = k, BINS  # lo: the last edge at which there is still time
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        u = EDGES[middle] - joined
        if times[middle] + shift + (per_step + growth * u) * u <= end:
            lo = middle
        else:
            hi = middle
    u0, u1 = max(0.0, EDGES[lo] - joined), EDGES[lo + 1] - joined
    t0 = at(times, joined + u0) + shift + (per_step + growth * u0) * u0
    t1 = times[lo + 1] + shift + (per_step + growth * u1) * u1
    return float(u0 + (u1 - u0) * min(1.0, max(0.0, (end - t0) / (t1 - t0))) if t1 > t0 else u0)
