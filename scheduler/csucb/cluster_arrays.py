"""The cluster as arrays: what compiled code reads, kept in step with `Node` and `Task` objects.

A node's rows are worked out anew only when its `version` says that it changed, so the arrays are a cache: they follow
from the cluster and from what was learned, and `forget` throws them away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from perllm.scheduler.core.cluster import Demand, Node, Task
from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.forecast import forecast_nodes
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.rows import (
    ARM,
    IN_FLIGHT,
    NODE,
    OFFER,
    OUTLOOK,
    ArmRow,
    ClusterRows,
    InFlightRow,
    NodeRow,
    Records,
    values,
)
from perllm.scheduler.csucb.usual_costs import UsualCosts

#: Prompt tokens of a step where nobody said how many there are at most: all.
WHOLE = 1e9
#: Sequences of nodes whose rows are remembered.
_REMEMBERED = 16
#: Demands for which the offers of each of these are.
_REMEMBERED_DEMANDS = 256


class ArmEstimate(NamedTuple):
    """The cost of a step of one model on one node (s; see `csucb.step_cost`), and its σ as a share."""

    step: float
    sequence: float
    prefill: float
    context: float
    spread: float


class NodeEstimate(NamedTuple):
    """What is believed of a node beside its registration, as of now. Units as in `NodeRow`."""

    arms: tuple[ArmEstimate, ...]  # of the models offered, in order
    watts: float
    bandwidth: float
    latency: float
    dispatch_delay: float
    stalled: bool
    arrival_rate: float
    arrival_prompt: float
    arrival_output: float
    slot_price: float
    stay: float
    throughput: float


@dataclass(slots=True)
class _Entry:
    """Where one node's rows are."""

    node: Node
    row: int
    arm: int  # row of its first model in `arms`; the others follow
    version: int = -1
    first: int = 0  # row of its first task in `in_flight`
    room: int = 0  # rows set aside for its tasks
    ids: list[str] = field(default_factory=list)  # of its tasks, in order
    heard: float = -1.0  # of the heartbeat whose progress they have


@dataclass(slots=True)
class _Asked:
    """A sequence of nodes, their entries and, by demand, the rows of their offers."""

    nodes: Sequence[Node]
    entries: list[tuple[Node, _Entry]]
    offers: dict[Demand, Records] = field(default_factory=dict)


class ClusterArrays:
    """Arrays over all nodes, as declared in `csucb.rows`.

    `lengths` holds the distributions tasks' output lengths are drawn from, `usual` what nodes' time usually costs;
    `estimate` gives what is believed of a node.
    """

    def __init__(self, lengths: Lengths, usual: UsualCosts, estimate: Callable[[Node], NodeEstimate]) -> None:
        self._lengths, self._usual, self._estimate = lengths, usual, estimate
        self.forget()

    def forget(self) -> None:
        """Drop everything; it is worked out anew when asked for."""
        self._entries: dict[str, _Entry] = {}
        self._arms_used = self._in_flight_used = 0
        self.nodes: Records = np.zeros(8, NODE)
        self.arms: Records = np.zeros(8, ARM)
        self.in_flight: Records = np.zeros(64, IN_FLIGHT)
        self._outlooks: Records = np.zeros(8, OUTLOOK)
        self._asked: dict[int, _Asked] = {}
        self._replaced = 0  # entries of nodes that were registered anew

    @property
    def rows(self) -> ClusterRows:
        """All arrays as they are now: to be read after `offers`, which may replace some."""
        return ClusterRows(self.nodes, self._outlooks, self.in_flight, self.arms, self._lengths.table, self._usual.rows)

    def offers(self, nodes: Sequence[Node], demand: Demand) -> Records:
        """An OfferRow for each of these nodes and the model that serves this there, what they refer to brought up to
        date."""
        asked = self._asked.get(id(nodes))
        if asked is None or asked.nodes is not nodes:
            asked = self._ask(nodes)
        changed = [entry for node, entry in asked.entries if entry.version != node.version]
        for entry in changed:
            self._update(entry)
        self._lengths.refresh()  # after the tasks have named the distributions they need, before they are read
        if changed:
            forecast_nodes(np.array([e.row for e in changed], np.int64), self.rows)
        offers = asked.offers.get(demand)
        if offers is None:
            if len(asked.offers) >= _REMEMBERED_DEMANDS:
                asked.offers.clear()
            pairs = [(entry.row, self._arm(node, demand)) for node, entry in asked.entries]
            offers = asked.offers[demand] = np.array(pairs, OFFER)
        return offers

    def _ask(self, nodes: Sequence[Node]) -> _Asked:
        """Remember where a sequence of nodes is; the core asks with the same few again and again."""
        if len(self._asked) >= _REMEMBERED:
            self._asked.clear()
        for node in nodes:
            self._entry(node)
        if len(self._entries) > 2 * len(nodes) + 64 or self._replaced > len(self._entries) + 64:
            self.forget()  # mostly nodes that are gone
            for node in nodes:
                self._entry(node)
        asked = self._asked[id(nodes)] = _Asked(nodes, [(node, self._entries[node.name]) for node in nodes])
        return asked

    def _arm(self, node: Node, demand: Demand) -> int:
        """The row in `arms` of the model that serves this on a node that has an entry; of its first one, should none
        (a task may be there from before the node was registered anew)."""
        if len(node.info.models) == 1:
            return self._entries[node.name].arm
        offer = node.offer(demand)
        at = 0 if offer is None else next(i for i, each in enumerate(node.info.models) if each is offer)
        return self._entries[node.name].arm + at

    def _entry(self, node: Node) -> _Entry:
        entry = self._entries.get(node.name)
        if entry is not None and entry.node is node:
            return entry
        self._replaced += entry is not None
        row = entry.row if entry is not None else len(self._entries)
        entry = _Entry(node, row, self._arms_used)
        self._asked.clear()  # arms have moved
        self._entries[node.name] = entry
        self._arms_used += len(node.info.models)
        while self._arms_used > len(self.arms):
            self.arms = _doubled(self.arms)
            self._outlooks = _doubled(self._outlooks)
        if row == len(self.nodes):
            self.nodes = _doubled(self.nodes)
        return entry

    def _update(self, entry: _Entry) -> None:
        node, estimate = entry.node, self._estimate(entry.node)
        for i, (offer, arm) in enumerate(zip(node.info.models, estimate.arms, strict=True)):
            self.arms[entry.arm + i] = values(
                ArmRow(*arm, chunk=offer.chunk or WHOLE, longest=offer.context, kv_tokens=offer.kv_tokens)
            )
        self._update_in_flight(entry)
        self.nodes[entry.row] = values(
            NodeRow(
                first=entry.first,
                count=len(entry.ids),
                taken=node.taken,
                slots=node.info.slots,
                places=node.info.slots + node.quick,
                heard=node.heard,
                changed=max(node.changed, node.heard),
                watts=estimate.watts,
                joules_per_byte=node.info.power.joules_per_byte,
                bandwidth=estimate.bandwidth,
                latency=estimate.latency,
                dispatch_delay=estimate.dispatch_delay,
                stalled=estimate.stalled,
                trusted=not node.pace.distrust,
                first_arm=entry.arm,
                arms=len(node.info.models),
                arrival_rate=estimate.arrival_rate,
                arrival_prompt=estimate.arrival_prompt,
                arrival_output=estimate.arrival_output,
                slot_price=estimate.slot_price,
                usual=self._usual.row(node.name),
                stay=estimate.stay,
                throughput=estimate.throughput,
            )
        )
        entry.version = node.version

    def _update_in_flight(self, entry: _Entry) -> None:
        in_flight = entry.node.in_flight
        ids = list(in_flight)
        if len(ids) > entry.room:
            self._make_room(entry, len(ids))
        mine = self.in_flight[entry.first : entry.first + entry.room]
        if ids != entry.ids:
            same = self._close_gaps(entry, mine, in_flight)
            if ids[:same] != entry.ids[:same]:
                same = 0  # one left and came back, to the end
            for i in range(same, len(ids)):
                mine[i] = values(self._row_of(entry, in_flight[ids[i]]))
            entry.ids = ids
        n = len(ids)
        mine["claimed"][:n] = [t.claimed or 0.0 for t in in_flight.values()]
        if entry.heard != entry.node.heard:
            mine["generated"][:n] = [t.generated for t in in_flight.values()]
            entry.heard = entry.node.heard

    @staticmethod
    def _close_gaps(entry: _Entry, mine: Records, in_flight: dict[str, Task]) -> int:
        """Move the rows of those still there together; returns how many there are."""
        for gone in [task_id for task_id in entry.ids if task_id not in in_flight]:
            i, n = entry.ids.index(gone), len(entry.ids)
            _close_gap(mine, i, n)
            del entry.ids[i]
        return len(entry.ids)

    def _row_of(self, entry: _Entry, task: Task) -> InFlightRow:
        return InFlightRow(
            dispatched=task.dispatched or 0.0,
            claimed=task.claimed or 0.0,
            generated=task.generated,
            prompt_tokens=task.prompt_tokens,
            payload_bytes=task.payload_bytes,
            deadline=task.deadline,
            max_tokens=task.most_output,
            n=task.n,
            width=min(task.n, entry.node.info.slots),
            value=task.value,
            lengths=self._lengths.row_of(task),
            arm=self._arm(entry.node, task.demand),
        )

    def _make_room(self, entry: _Entry, need: int) -> None:
        """Move a node's tasks to where there is room for them (and some more) in a row."""
        room = max(2 * need, entry.node.info.slots + 4)
        while self._in_flight_used + room > len(self.in_flight):
            self.in_flight = _doubled(self.in_flight)
        old = self.in_flight[entry.first : entry.first + len(entry.ids)].copy()
        entry.first, entry.room = self._in_flight_used, room
        self.in_flight[entry.first : entry.first + len(old)] = old
        self._in_flight_used += room


@compiled
def _close_gap(rows: Records, gap: int, count: int) -> None:
    """Move the rows after `gap`, of the first `count`, up by one."""
    for i in range(gap, count - 1):
        rows[i] = rows[i + 1]


def _doubled(array: Records) -> Records:
    return np.concatenate([array, np.zeros_like(array)])
