"""One task scored on many nodes in one compiled call."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.admission import (
    MIN_P_ON_TIME,
    counted_energy,
    time_after_waiting,
    worth_now,
    worth_of_waiting,
)
from perllm.scheduler.csucb.constraints import bandwidth_slack, compute_slack, deadline_slack, memory_slack
from perllm.scheduler.csucb.forecast import (
    forecast_task,
    harm,
    kv_needed,
    p_on_time_alone,
    width,
)
from perllm.scheduler.csucb.index import index
from perllm.scheduler.csucb.rows import (
    ArmRow,
    ClusterRows,
    Ints,
    NodeRow,
    OfferRow,
    Records,
    ScoreRow,
    TaskRow,
    TermsRow,
    ToldRow,
    VerdictRow,
)
from perllm.scheduler.csucb.usual_costs import note

Access = NDArray[np.uint8]
#: Whether a task may go to a node: never, when there is room, now.
NEVER, LATER, NOW = 0, 1, 2

#: What an explanation notes of a node.
NOTES = ("", "stands still", "has no room for it now", "would be too late", "lost it a moment ago")
FINE, STALLED, FULL, LATE, AVOIDED = range(5)
#: The index of a node the task cannot go to.
INFEASIBLE = -1e18
#: The harm where it was not worked out.
UNKNOWN = -1.0


@compiled
def decide(
    cluster: ClusterRows,
    offers: Records,
    access: Access,
    tasks: Records,
    terms: Records,
    now: float,
    scores: Records,
    verdicts: Records,
) -> None:
    """Fill `scores` (a ScoreRow per offer) and the first of `verdicts` for the first of `tasks` under the first of
    `terms`. `access` says of each offer whether the task may go there: NOW, LATER or NEVER."""
    task: TaskRow = tasks[0]
    term: TermsRow = terms[0]
    verdict: VerdictRow = verdicts[0]
    after_waiting = 0.0
    if term.patience:
        throughput = 0.0
        for i in range(len(offers)):
            throughput += cluster.nodes[offers[i].node].throughput
        after_waiting = time_after_waiting(task.deadline - now, term.backlog, throughput)
    least, verdict.possible = math.inf, False
    for i in range(len(offers)):
        own: ScoreRow = scores[i]
        _score_without_harm(cluster, offers[i], access[i], task, term, now, after_waiting, own)
        verdict.possible = verdict.possible or own.index > INFEASIBLE
        if _awaited(cluster, offers[i], access[i], own):
            least = min(least, own.joules)
    verdict.best, verdict.least_joules, verdict.waiting = -1, least, 0.0
    if not verdict.possible:
        return
    most = term.value_weight * task.value
    counted = counted_energy(least / term.energy_scale, most)
    if after_waiting > 0.0:
        verdict.waiting = _worth_of_waiting(cluster, offers, access, most, counted / term.energy_scale, scores)
    if verdict.waiting > 0.0:  # it need not queue on a node
        for i in range(len(offers)):
            node: NodeRow = cluster.nodes[offers[i].node]
            if node.taken >= node.places:
                scores[i].index = INFEASIBLE
    best = _best(cluster, offers, task, term, now, scores)
    _note_costs(cluster, offers, term, now, scores)
    if best >= 0:
        energy = scores[best].joules / term.energy_scale
        verdict.best, verdict.joules = best, scores[best].joules
        verdict.worth = worth_now(scores[best].index + energy, counted * energy, verdict.waiting, most)


@compiled
def _awaited(cluster: ClusterRows, offer: OfferRow, access: int, own: ScoreRow) -> bool:
    """Whether a node is one to count on, now or later."""
    node: NodeRow = cluster.nodes[offer.node]
    return bool(own.p_on_time >= MIN_P_ON_TIME and access != NEVER and node.trusted)


@compiled
def _note_costs(cluster: ClusterRows, offers: Records, terms: TermsRow, now: float, scores: Records) -> None:
    """Learn what nodes' time costs now, of those of which it was worked out."""
    for i in range(len(offers)):
        own: ScoreRow = scores[i]
        if own.harm >= 0.0 and own.busy > 0.0:
            node: NodeRow = cluster.nodes[offers[i].node]
            note(cluster.usual[node.usual], (terms.harm_weight * own.harm + own.slot_cost) / own.busy, node.stay, now)


@compiled
def _worth_of_waiting(
    cluster: ClusterRows, offers: Records, access: Access, most: float, per_joule: float, scores: Records
) -> float:
    """What waiting is worth, for the node that would then be best; at least nothing."""
    worth = 0.0
    for i in range(len(offers)):
        own: ScoreRow = scores[i]
        if _awaited(cluster, offers[i], access[i], own):
            usual = cluster.usual[cluster.nodes[offers[i].node].usual].cost * own.busy
            worth = max(worth, worth_of_waiting(most * own.p_later, own.joules * per_joule, usual))
    return worth


@compiled
def _best(cluster: ClusterRows, offers: Records, task: TaskRow, terms: TermsRow, now: float, scores: Records) -> int:
    """The position of the best score, or −1 when none is feasible.

    The index without harm bounds the index, so the harm is worked out only where that could still be the best;
    elsewhere `index` is that bound and `harm` UNKNOWN.
    """
    first, bound = -1, INFEASIBLE
    for i in range(len(scores)):
        if scores[i].index > bound:
            first, bound = i, scores[i].index
    if first < 0:
        return -1
    best, highest = -1, INFEASIBLE
    for turn in range(len(scores) + 1):
        i = first if turn == 0 else turn - 1  # the most promising one first, then the others that might beat it
        if scores[i].index <= highest or scores[i].harm >= 0:
            continue
        _add_harm(cluster, offers[i], task, terms, now, scores[i])
        if scores[i].index > highest:
            best, highest = i, scores[i].index
    return best


@compiled
def explain(
    cluster: ClusterRows,
    offers: Records,
    access: Access,
    tasks: Records,
    terms: Records,
    now: float,
    scores: Records,
    told: Records,
) -> int:
    """Fill `told` with the best scores, the best first, harm worked out; returns how many there are."""
    count = 0
    order = np.empty(len(told), np.int64)
    for i in range(len(scores)):
        count = _insert(order, count, scores, i)
    for k in range(count):
        own: ScoreRow = scores[order[k]]
        if own.harm < 0 and own.index > INFEASIBLE:
            _add_harm(cluster, offers[order[k]], tasks[0], terms[0], now, own)
    best, order = order, np.empty(len(told), np.int64)
    for k in range(count):
        _insert(order, k, scores, best[k])
    for k in range(count):
        _tell(cluster, offers[order[k]], access[order[k]], tasks[0], now, scores[order[k]], told[k])
        told[k].offer = order[k]
    return count


@compiled
def _insert(order: Ints, count: int, scores: Records, i: int) -> int:
    """Put position `i` among the first `count` in order of their scores, the best first, of equals the earlier; returns
    how many there are then."""
    k = count
    while k > 0 and scores[order[k - 1]].index < scores[i].index:
        if k < len(order):
            order[k] = order[k - 1]
        k -= 1
    if k < len(order):
        order[k] = i
    return min(count + 1, len(order))


@compiled
def _tell(
    cluster: ClusterRows, offer: OfferRow, access: int, task: TaskRow, now: float, own: ScoreRow, told: ToldRow
) -> None:
    node: NodeRow = cluster.nodes[offer.node]
    arm: ArmRow = cluster.arms[offer.arm]
    left = task.deadline - now
    told.feasible, told.note = own.index > INFEASIBLE, FINE
    if node.stalled:
        told.note = STALLED
    elif not told.feasible:
        told.note = FULL if own.p_on_time >= MIN_P_ON_TIME else AVOIDED if access == NEVER else LATE
    told.index, told.finish = _short(own.index), _short(own.finish)
    told.p_on_time, told.joules = _short(own.p_on_time), _short(own.joules)
    told.deadline = _short(deadline_slack(own.finish, left))
    told.compute = _short(compute_slack(node.taken + width(node, task), float(node.slots)))
    told.memory = _short(memory_slack(kv_needed(node, task, cluster.lengths), arm.kv_used, arm.kv_tokens))
    told.bandwidth = _short(bandwidth_slack(task.payload_bytes, node.bytes_coming, node.bandwidth, left))
    told.confidence = _short(1.0 / (1.0 + arm.spread))


@compiled
def _short(value: float) -> float:
    """Four digits of it."""
    if value == 0.0 or not math.isfinite(value):
        return value
    scale = 10.0 ** (3.0 - math.floor(math.log10(abs(value))))
    return float(math.floor(value * scale + 0.5) / scale)


@compiled
def best_p_on_time_alone(cluster: ClusterRows, offers: Records, tasks: Records, now: float) -> float:
    """The best P(on time) any of the nodes would give the first of `tasks` if it had nothing else to do."""
    best = 0.0
    for i in range(len(offers)):
        node, arm = cluster.nodes[offers[i].node], cluster.arms[offers[i].arm]
        best = max(best, p_on_time_alone(node, arm, tasks[0], now, cluster.lengths))
    return best


@compiled
def _score_without_harm(
    cluster: ClusterRows,
    offer: OfferRow,
    access: int,
    task: TaskRow,
    terms: TermsRow,
    now: float,
    after_waiting: float,
    own: ScoreRow,
) -> None:
    """Fill the score of one offer, its harm UNKNOWN."""
    node: NodeRow = cluster.nodes[offer.node]
    arm: ArmRow = cluster.arms[offer.arm]
    forecast_task(node, arm, cluster.outlooks[offer.arm], task, now, after_waiting, cluster.lengths, own)
    own.harm, own.index = UNKNOWN, INFEASIBLE
    if node.stalled or arm.longest < task.least_context:
        own.p_on_time = own.p_later = 0.0
    kv_slack = memory_slack(kv_needed(node, task, cluster.lengths), arm.kv_used, arm.kv_tokens)
    kv_full = arm.kv_used > 0 and kv_slack < 0
    if own.p_on_time < MIN_P_ON_TIME or kv_full or access != NOW:
        return
    own.slot_cost = node.slot_price * own.stay * width(node, task)
    gained = own.p_on_time * task.value
    own.index = index(terms.value_weight, gained, 0.0, own.joules, terms.energy_scale, own.slot_cost)


@compiled
def _add_harm(cluster: ClusterRows, offer: OfferRow, task: TaskRow, terms: TermsRow, now: float, own: ScoreRow) -> None:
    """Work out the harm a task does at a candidate, and take it off its index."""
    own.harm = harm(cluster, offer, task, now)
    own.index -= terms.harm_weight * own.harm
