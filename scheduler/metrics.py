"""The sums the leading scheduler keeps for `/metrics`: of every event it reads, once, whoever leads.

They are written down with the snapshot, in the same call and with the same place in the stream, and a new leader goes
on from there: an event counts once however often leaders change, and no count ever falls back. What is counted besides
events (decisions, sweeps) may lose the seconds since the last snapshot when a leader dies.
"""

from __future__ import annotations

import math
import time
from typing import Any

from perllm.broker.ledger import later
from perllm.broker.messages import Completed, Dispatched, Ended, Event, NodeBelief, Receipt, Returned, State
from perllm.broker.metrics import ENERGY_METHODS, OTHER, Family, Labels, Sums
from perllm.scheduler.core.cluster import Task
from perllm.scheduler.core.scheduler import Decision, SchedulerCore

#: Looking through the backlog takes this part of the time at most, however long it is.
BACKLOG_SHARE = 0.01
#: Nodes whose rows are written down.
MAX_NODES = 1000


class Metrics:
    """The sums about one core. Times are the ledger server's clock, s."""

    def __init__(self, core: SchedulerCore, epoch: int) -> None:
        self._core, self._epoch = core, epoch
        self._sums = Sums()
        self._counted = "0-0"  # the place in the stream up to which events are in the sums
        self._replaying = False  # events before it may be read again
        self._ending: dict[str, Task] = {}  # tasks the core ended, until the stream says so
        self._lag = self._sweep_took = 0.0
        self._backlog: dict[int, tuple[int, float]] = {}
        self._backlog_due = -math.inf

    def restore(self, data: dict[str, Any], now: float) -> None:
        """Go on from what the last leader wrote down."""
        self._sums = Sums.parse(data.get("sums"))
        position = data.get("position")
        if isinstance(position, str) and _is_position(position):
            self._counted, self._replaying = position, True
        for family, labels, _ in self._sums.rows():
            if family.labels[:1] == ("tenant",):
                self._core.groups.keep((labels[0], labels[1], labels[2]), now)

    # --- what happens

    def event(self, position: str, event: Event) -> None:
        """Count an event of the stream, before the core takes it."""
        if self._replaying:
            if not later(position, self._counted):
                return
            self._replaying = False
        began = time.perf_counter()
        match event:
            case Dispatched():
                self._dispatched(event)
            case Completed():
                self._completed(event)
            case Ended():
                self._ended(event)
            case Returned():
                self._sums.add("perllm_attempts_replaced", (event.node, event.cause))
            case _:
                pass
        self._sums.add("perllm_accounting_seconds", (), time.perf_counter() - began)

    def read(self, oldest: float, now: float) -> None:
        """Events were read, the oldest of them as old as this."""
        self._lag = max(self._lag, now - oldest)

    def ending(self, decision: Decision) -> None:
        """The ledger has taken a decision to end a task: the core knows the task no more when the stream says so."""
        self._ending[decision.task.id] = decision.task

    def swept(self, mended: int, seconds: float) -> None:
        """A sweep."""
        self._sums.add("perllm_sweeps")
        self._sums.add("perllm_sweep_mended", (), mended)
        self._sweep_took = max(self._sweep_took, seconds)

    def _group(self, task: Task | None, model: str | None, now: float) -> Labels:
        if task is None:  # it was there before this leader session, and is none any more
            return (OTHER, OTHER, OTHER)
        groups = self._core.groups
        return groups.names(groups.number(task.tenant, task.service, model, now))

    def _dispatched(self, event: Dispatched) -> None:
        if (task := self._core.find(event.id)) is not None:
            group = self._group(task, event.model, event.at)
            left = max(0.0, task.deadline - event.at)
            self._sums.observe("perllm_time_to_deadline_at_dispatch_seconds", group, left)
        self._sums.add("perllm_arm_pulls", (event.node, event.model))

    def _completed(self, event: Completed) -> None:
        sums, receipt, task = self._sums, event.receipt, self._core.find(event.id)
        model = receipt.model if self._core.knows_model(receipt.model) else OTHER
        group = self._group(task, model, event.at)
        sums.add("perllm_requests", (*group, str(event.state), str(event.on_time).lower()))
        if task is not None:
            asleep = max(0.0, task.start - task.submitted)
            self._at_end(task, group, event.at)
            sums.observe("perllm_request_queue_time_seconds", group, max(0.0, event.queued - asleep))
            if event.state is State.SUCCEEDED:
                self._latencies(event, group, asleep)
        self._tokens(receipt, group, (event.node, model))
        energy = receipt.energy
        for stage, joules in (("transfer", energy.transfer), ("inference", energy.inference), ("idle", energy.idle)):
            if joules:
                sums.add("perllm_energy_joules", (*group, stage), joules)
        sums.add("perllm_arm_energy_joules", (event.node, model), energy.total)
        method = energy.method if energy.method in ENERGY_METHODS else OTHER
        sums.add("perllm_receipts", (event.node, method, str(energy.estimated).lower()))

    def _latencies(self, event: Completed, group: Labels, asleep: float) -> None:
        sums, receipt = self._sums, event.receipt
        sums.observe("perllm_e2e_request_latency_seconds", group, max(0.0, event.latency - asleep))
        tokens = max(receipt.choice_tokens, default=receipt.completion_tokens)
        if tokens:
            first = event.queued - asleep + receipt.transfer + receipt.wait + receipt.prefill
            sums.observe("perllm_time_to_first_token_seconds", group, max(0.0, first))
        if tokens > 1:
            sums.observe("perllm_time_per_output_token_seconds", group, receipt.decode / (tokens - 1))

    def _tokens(self, receipt: Receipt, group: Labels, arm: Labels) -> None:
        sums = self._sums
        sums.add("perllm_prompt_tokens", group, receipt.prompt_tokens)
        sums.add("perllm_generation_tokens", group, receipt.completion_tokens)
        sums.add("perllm_arm_prompt_tokens", arm, receipt.prompt_tokens)
        sums.add("perllm_arm_generation_tokens", arm, receipt.completion_tokens)
        sums.add("perllm_prefix_cache_queries", arm, receipt.prompt_tokens)
        sums.add("perllm_prefix_cache_hits", arm, receipt.cached_tokens)

    def _ended(self, event: Ended) -> None:
        task = self._ending.pop(event.id, None) or self._core.find(event.id)
        group = self._group(task, None if task is None else task.model, event.at)
        self._sums.add("perllm_requests", (*group, str(event.state), "false"))
        if task is not None:
            self._at_end(task, group, event.at)

    def _at_end(self, task: Task, group: Labels, at: float) -> None:
        left = task.deadline - at
        early = "perllm_time_to_deadline_at_end_seconds"
        self._sums.observe(early if left >= 0 else "perllm_lateness_seconds", group, abs(left))

    # --- written down

    def dump(self, position: str, now: float) -> tuple[dict[str, Any], dict[str, NodeBelief]]:
        """All of it, as of this place in the stream, and what the policy believes of the nodes."""
        began = time.perf_counter()
        beliefs = self._core.policy.beliefs(self._core.cluster, now)
        sums = self._sums
        self._look_at_backlog(now)
        self._note_beliefs(beliefs)
        for (action, reason), count in self._core.decided.items():
            sums.add("perllm_decisions", (action, reason), count)
        self._core.decided.clear()
        sums.clear("perllm_scheduler_info")
        sums.set("perllm_scheduler_info", (self._core.policy.name,), 1.0)
        sums.set("perllm_scheduler_takeovers", (), float(self._epoch))
        sums.set("perllm_stream_lag_seconds", (), self._lag)
        sums.set("perllm_sweep_seconds", (), self._sweep_took)
        self._lag = self._sweep_took = 0.0
        self._forget(now)
        data = {"at": now, "position": position, "sums": sums.dump()}
        sums.add("perllm_accounting_seconds", (), time.perf_counter() - began)
        return data, beliefs

    def _look_at_backlog(self, now: float) -> None:
        if (began := time.perf_counter()) >= self._backlog_due:
            self._backlog = self._core.pending.backlog()
            took = time.perf_counter() - began
            self._backlog_due = began + took / BACKLOG_SHARE
        self._sums.clear("perllm_backlog")
        self._sums.clear("perllm_backlog_oldest_seconds")
        for number, (count, since) in self._backlog.items():
            if not count:
                continue
            names = self._core.groups.names(number)
            self._sums.set("perllm_backlog", names, float(count))
            self._sums.set("perllm_backlog_oldest_seconds", names, max(0.0, now - since))

    def _note_beliefs(self, beliefs: dict[str, NodeBelief]) -> None:
        sums, nodes = self._sums, self._core.cluster.nodes
        for name in _BELIEFS:
            sums.clear(name)
        for name, belief in beliefs.items():
            sums.set("perllm_node_bandwidth_bytes_per_second", (name, "registered"), nodes[name].info.bandwidth)
            sums.set("perllm_node_bandwidth_bytes_per_second", (name, "learned"), belief.bandwidth)
            sums.set("perllm_node_link_latency_seconds", (name,), belief.latency)
            sums.set("perllm_node_dispatch_delay_seconds", (name,), belief.dispatch_delay)
            sums.set("perllm_node_slot_price", (name,), belief.slot_price)
            for model, arm in belief.models.items():
                step = arm.cost.step + arm.cost.sequence
                for bound, factor in (("lower", -arm.spread), ("mean", 0.0), ("upper", arm.spread)):
                    sums.set("perllm_arm_token_seconds", (name, model, bound), step * math.exp(min(factor, 50.0)))
                sums.set("perllm_arm_prefill_token_seconds", (name, model), arm.cost.prefill)
                sums.set("perllm_arm_samples", (name, model), arm.samples)

    def _forget(self, now: float) -> None:
        """Rows of nodes that are no more, and of groups that have not been used for long where room is scarce."""
        groups, nodes = self._core.groups, self._core.known_nodes
        if len(nodes) > MAX_NODES:
            nodes = set(sorted(nodes)[:MAX_NODES])
        groups.forget_idle(now, self._backlog)

        def known(family: Family, labels: Labels) -> bool:
            first = family.labels[:1]
            if first == ("node",):
                return labels[0] in nodes
            return first != ("tenant",) or labels[:3] in groups or labels[0] == OTHER

        self._sums.keep(known)


#: What is noted anew each time.
_BELIEFS = (
    "perllm_node_bandwidth_bytes_per_second",
    "perllm_node_link_latency_seconds",
    "perllm_node_dispatch_delay_seconds",
    "perllm_node_slot_price",
    "perllm_arm_token_seconds",
    "perllm_arm_prefill_token_seconds",
    "perllm_arm_samples",
)


def _is_position(text: str) -> bool:
    try:
        later(text, text)
    except ValueError:
        return False
    return True
