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
    VerdictRow,
)

Access = NDArray[np.uint8]
#: Whether a task may go to a node: never, when there is room, now.
NEVER, LATER, NOW = 0, 1, 2

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
        if own.p_on_time >= MIN_P_ON_TIME and access[i] != NEVER:
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
    if best >= 0:
        energy = scores[best].joules / term.energy_scale
        verdict.best, verdict.joules = best, scores[best].joules
        verdict.worth = worth_now(scores[best].index + energy, counted * energy, verdict.waiting, most)


@compiled
def _worth_of_waiting(
    cluster: ClusterRows, offers: Records, access: Access, most: float, per_joule: float, scores: Records
) -> float:
    """What waiting is worth, for the node that would then be best; at least nothing."""
    worth = 0.0
    for i in range(len(offers)):
        own: ScoreRow = scores[i]
        if own.p_on_time >= MIN_P_ON_TIME and access[i] != NEVER:
            usual = cluster.nodes[offers[i].node].usual_cost * own.busy
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
def complete_scores(
    positions: Ints,
    cluster: ClusterRows,
    offers: Records,
    tasks: Records,
    terms: Records,
    now: float,
    scores: Records,
) -> None:
    """Fill in what `score` left out of the candidates at these positions: harm, and the slacks of the constraints."""
    task: TaskRow = tasks[0]
    left = task.deadline - now
    for i in positions:
        node: NodeRow = cluster.nodes[offers[i].node]
        arm: ArmRow = cluster.arms[offers[i].arm]
        own: ScoreRow = scores[i]
        own.deadline_slack = deadline_slack(own.finish, left)
        own.compute_slack = compute_slack(node.taken + width(node, task), float(node.slots))
        own.memory_slack = memory_slack(kv_needed(node, task, cluster.lengths), arm.kv_used, arm.kv_tokens)
        own.bandwidth_slack = bandwidth_slack(task.payload_bytes, node.bytes_coming, node.bandwidth, left)
        if own.harm < 0 and own.index > INFEASIBLE:
            _add_harm(cluster, offers[i], task, terms[0], now, own)


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
