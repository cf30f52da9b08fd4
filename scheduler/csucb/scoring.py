"""One task against many nodes in one compiled call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.csucb import forecast as f
from perllm.scheduler.csucb.compiled import compiled
from perllm.scheduler.csucb.constraints import bandwidth_slack, compute_slack, deadline_slack, memory_slack
from perllm.scheduler.csucb.forecast import Cube, Matrix
from perllm.scheduler.csucb.index import index
from perllm.scheduler.csucb.output_lengths import MEAN
from perllm.scheduler.csucb.token_bins import Floats, at

#: What the index is made of beside the forecast: V for the task itself and for others' harm, E₀ (J); the least chance
#: a node must give; 1 if it must have a slot free.
OWN, OTHERS, SCALE, LEAST, FREE, TERMS = range(6)
#: The index of a node that is out of the question.
OUT = -1e18


@compiled
def score(
    rows: NDArray[np.int64],
    arm_rows: NDArray[np.int64],
    task: Floats,
    terms: Floats,
    now: float,
    nodes: Matrix,
    arms: Matrix,
    in_flight: Matrix,
    table: Cube,
    maps: Cube,
    looks: Matrix,
) -> int:
    """Fill `looks` (candidates, LOOK_COLUMNS) for the task on nodes `rows`; returns the position of the best, or −1
    when none is in question.

    The index without harm bounds the index, so the harm is worked out only where that could still be the best;
    elsewhere INDEX is that bound and HARM −1.
    """
    first, bound = -1, OUT
    need = _need(task, table)
    for i in range(len(rows)):
        n, arm, look = rows[i], arms[arm_rows[i]], looks[i]
        node = nodes[n]
        f.weigh(node, arm, task, now, table, maps[f.TIME, n], maps[f.TAKEN, n], maps[f.ALONE, n], look)
        look[f.HARM], look[f.INDEX] = -1.0, OUT
        if node[f.STILL] > 0:
            look[f.CHANCE] = 0.0
        full = arm[f.KV_USED] > 0 and memory_slack(need, arm[f.KV_USED], arm[f.KV]) < 0
        queues = terms[FREE] > 0 and node[f.COUNT] >= node[f.SLOTS]
        if look[f.CHANCE] < terms[LEAST] or full or queues:
            continue
        look[f.TOLL_PAID] = node[f.TOLL] * look[f.STAY]
        gained = look[f.CHANCE] * task[f.T_VALUE]
        look[f.INDEX] = index(terms[OWN], gained, 0.0, look[f.JOULES], terms[SCALE], look[f.TOLL_PAID])
        if look[f.INDEX] > bound:
            first, bound = i, look[f.INDEX]
    if first < 0:
        return -1
    best, score = -1, OUT
    for step in range(len(rows) + 1):
        i = first if step == 0 else step - 1  # the most promising one first, then the others that might beat it
        look = looks[i]
        if look[f.INDEX] <= score or look[f.HARM] >= 0:
            continue
        _add_harm(rows[i], arms[arm_rows[i]], task, terms, now, nodes, in_flight, table, maps, look)
        if look[f.INDEX] > score:
            best, score = i, look[f.INDEX]
    return best


@compiled
def _add_harm(
    n: int,
    arm: Floats,
    task: Floats,
    terms: Floats,
    now: float,
    nodes: Matrix,
    in_flight: Matrix,
    table: Cube,
    maps: Cube,
    look: Floats,
) -> None:
    first, count = int(nodes[n, f.FIRST]), int(nodes[n, f.COUNT])
    mine = in_flight[first : first + count]
    look[f.HARM] = f.harm(nodes[n], arm, task, now, mine, table, maps[f.TIME, n], maps[f.TAKEN, n])
    look[f.INDEX] -= terms[OTHERS] * look[f.HARM]


@compiled
def complete(
    some: NDArray[np.int64],
    rows: NDArray[np.int64],
    arm_rows: NDArray[np.int64],
    task: Floats,
    terms: Floats,
    now: float,
    nodes: Matrix,
    arms: Matrix,
    in_flight: Matrix,
    table: Cube,
    maps: Cube,
    looks: Matrix,
) -> None:
    """Fill in what `score` left out of the candidates at positions `some`: harm, and the slacks of the constraints."""
    left, need = task[f.T_DEADLINE] - now, _need(task, table)
    for i in some:
        node, arm, look = nodes[rows[i]], arms[arm_rows[i]], looks[i]
        look[f.C_DEADLINE] = deadline_slack(look[f.FINISH], left)
        look[f.C_COMPUTE] = compute_slack(node[f.COUNT] + 1, node[f.SLOTS])
        look[f.C_MEMORY] = memory_slack(need, arm[f.KV_USED], arm[f.KV])
        look[f.C_BANDWIDTH] = bandwidth_slack(task[f.T_BYTES], node[f.COMING], node[f.RATE], left)
        if look[f.HARM] < 0 and look[f.INDEX] > OUT:
            _add_harm(rows[i], arm, task, terms, now, nodes, in_flight, table, maps, look)


@compiled
def _need(task: Floats, table: Cube) -> float:
    """Tokens of KV cache the task will probably hold."""
    return float(task[f.T_PROMPT] + at(table[int(task[f.T_LENGTH]), MEAN], task[f.T_MOST]))


@compiled
def best_alone(
    rows: NDArray[np.int64],
    arm_rows: NDArray[np.int64],
    task: Floats,
    now: float,
    nodes: Matrix,
    arms: Matrix,
    table: Cube,
) -> float:
    """The best P(on time) any of the nodes would give the task if it had nothing else to do."""
    best = 0.0
    for i in range(len(rows)):
        best = max(best, f.chance_alone(nodes[rows[i]], arms[arm_rows[i]], task, now, table))
    return best
