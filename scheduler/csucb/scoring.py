"""One task scored on many nodes in one compiled call."""

from __future__ import annotations

from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.constraints import bandwidth_slack, compute_slack, deadline_slack, memory_slack
from perllm.scheduler.csucb.forecast import (
    forecast_task,
    harm,
    in_flight_on,
    kv_needed,
    p_on_time_alone,
    width,
)
from perllm.scheduler.csucb.index import index
from perllm.scheduler.csucb.rows import (
    ArmRow,
    CandidateRow,
    ClusterRows,
    Ints,
    NodeRow,
    Records,
    ScoreRow,
    TaskRow,
    TermsRow,
)

#: The index of a node the task cannot go to.
INFEASIBLE = -1e18
#: The harm where it was not worked out.
UNKNOWN = -1.0


@compiled
def score(
    cluster: ClusterRows, candidates: Records, tasks: Records, terms: Records, now: float, scores: Records
) -> int:
    """Fill `scores` (a ScoreRow per candidate) for the first of `tasks` under the first of `terms`; returns the
    position of the best, or −1 when none is feasible.

    The index without harm bounds the index, so the harm is worked out only where that could still be the best;
    elsewhere `index` is that bound and `harm` UNKNOWN.
    """
    first, bound = -1, INFEASIBLE
    for i in range(len(scores)):
        _score_without_harm(cluster, candidates[i], tasks[0], terms[0], now, scores[i])
        if scores[i].index > bound:
            first, bound = i, scores[i].index
    if first < 0:
        return -1
    best, highest = -1, INFEASIBLE
    for turn in range(len(scores) + 1):
        i = first if turn == 0 else turn - 1  # the most promising one first, then the others that might beat it
        if scores[i].index <= highest or scores[i].harm >= 0:
            continue
        _add_harm(cluster, candidates[i], tasks[0], terms[0], now, scores[i])
        if scores[i].index > highest:
            best, highest = i, scores[i].index
    return best


@compiled
def complete_scores(
    positions: Ints,
    cluster: ClusterRows,
    candidates: Records,
    tasks: Records,
    terms: Records,
    now: float,
    scores: Records,
) -> None:
    """Fill in what `score` left out of the candidates at these positions: harm, and the slacks of the constraints."""
    task: TaskRow = tasks[0]
    left = task.deadline - now
    for i in positions:
        node: NodeRow = cluster.nodes[candidates[i].node]
        arm: ArmRow = cluster.arms[candidates[i].arm]
        own: ScoreRow = scores[i]
        own.deadline_slack = deadline_slack(own.finish, left)
        own.compute_slack = compute_slack(node.taken + width(node, task), float(node.slots))
        own.memory_slack = memory_slack(kv_needed(node, task, cluster.lengths), arm.kv_used, arm.kv_tokens)
        own.bandwidth_slack = bandwidth_slack(task.payload_bytes, node.bytes_coming, node.bandwidth, left)
        if own.harm < 0 and own.index > INFEASIBLE:
            _add_harm(cluster, candidates[i], task, terms[0], now, own)


@compiled
def best_p_on_time_alone(cluster: ClusterRows, candidates: Records, tasks: Records, now: float) -> float:
    """The best P(on time) any of the nodes would give the first of `tasks` if it had nothing else to do."""
    best = 0.0
    for i in range(len(candidates)):
        node, arm = cluster.nodes[candidates[i].node], cluster.arms[candidates[i].arm]
        best = max(best, p_on_time_alone(node, arm, tasks[0], now, cluster.lengths))
    return best


@compiled
def _score_without_harm(
    cluster: ClusterRows, candidate: CandidateRow, task: TaskRow, terms: TermsRow, now: float, own: ScoreRow
) -> None:
    """Fill the score of one candidate, its harm UNKNOWN."""
    node: NodeRow = cluster.nodes[candidate.node]
    arm: ArmRow = cluster.arms[candidate.arm]
    forecast_task(node, arm, cluster.outlooks[candidate.node], task, now, cluster.lengths, own)
    own.harm, own.index = UNKNOWN, INFEASIBLE
    if node.stalled:
        own.p_on_time = 0.0
    kv_slack = memory_slack(kv_needed(node, task, cluster.lengths), arm.kv_used, arm.kv_tokens)
    kv_full = arm.kv_used > 0 and kv_slack < 0
    queues = terms.needs_slot and node.taken >= node.slots
    if own.p_on_time < terms.min_p_on_time or kv_full or queues:
        return
    own.slot_cost = node.slot_price * own.stay * width(node, task)
    gained = own.p_on_time * task.value
    own.index = index(terms.own_weight, gained, 0.0, own.joules, terms.energy_scale, own.slot_cost)


@compiled
def _add_harm(
    cluster: ClusterRows, candidate: CandidateRow, task: TaskRow, terms: TermsRow, now: float, own: ScoreRow
) -> None:
    """Work out the harm a task does at a candidate, and take it off its index."""
    n = candidate.node
    node: NodeRow = cluster.nodes[n]
    arm: ArmRow = cluster.arms[candidate.arm]
    own.harm = harm(node, arm, cluster.outlooks[n], task, now, in_flight_on(cluster, n), cluster.lengths)
    own.index -= terms.harm_weight * own.harm
