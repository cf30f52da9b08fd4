"""The cluster as arrays: what compiled code reads, kept in step with `Node` and `Task` objects.

A node's rows are worked out anew only when its `version` says that it changed, so the arrays are a cache: they follow
from the cluster and from what was learned, and `forget` throws them away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.core.cluster import Node, Task
from perllm.scheduler.csucb import forecast as f
from perllm.scheduler.csucb.forecast import Cube, Matrix
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.token_bins import BINS

Rows = NDArray[np.int64]

#: Sequences of nodes whose rows are remembered.
_REMEMBERED = 16


@dataclass(frozen=True, slots=True)
class Learned:
    """What is known of a node beside its registration, as of now."""

    steps: tuple[
        tuple[float, float, float, float, float], ...
    ]  # per model offered: cost of a step, and its σ as a share
    watts: float  # beyond idle, while it steps
    rate: float  # bytes/s
    latency: float  # s of a transfer beyond its bytes
    dispatch_delay: float  # s from a decision to its queue
    still: bool  # it stands still: nothing sent there would be done
    inflow: tuple[float, float, float]  # tasks/s that usually come, their mean prompt and output, tokens
    toll: float  # price of a second in a slot
    pace: float  # tasks/s its slots can finish


@dataclass(slots=True)
class _Entry:
    """Where one node's rows are."""

    node: Node
    row: int
    arm: int  # row of its first model in `arms`; the others follow
    version: int = -1
    first: int = 0  # row of its first flight
    room: int = 0  # rows set aside for in_flight
    ids: list[str] = field(default_factory=list)  # of the in_flight, in order
    heard: float = -1.0  # of the heartbeat whose progress they have


@dataclass(slots=True)
class _Asked:
    """A sequence of nodes and where its rows are."""

    nodes: Sequence[Node]
    rows: Rows
    arms: dict[str | None, Rows] = field(default_factory=dict)


class ClusterArrays:
    """Arrays over all nodes; columns are those of `perllm.scheduler.csucb.forecast`.

    `lengths` holds the distributions tasks' output lengths are drawn from; `learned` gives what is known of a node.
    """

    def __init__(self, lengths: Lengths, learned: Callable[[Node], Learned]) -> None:
        self._lengths, self._learned = lengths, learned
        self.forget()

    def forget(self) -> None:
        """Drop everything; it is worked out anew when asked for."""
        self._entries: dict[str, _Entry] = {}
        self._arms_used = self._flights_used = 0
        self.nodes: Matrix = np.zeros((8, f.NODE_COLUMNS))
        self.arms: Matrix = np.zeros((8, f.ARM_COLUMNS))
        self.in_flight: Matrix = np.zeros((64, f.FLIGHT_COLUMNS))
        self.maps: Cube = np.zeros((3, 8, BINS + 1))
        self._asked: dict[int, _Asked] = {}
        self._replaced = 0  # entries of nodes that were registered anew

    def rows(self, nodes: Sequence[Node], model: str | None) -> tuple[Rows, Rows]:
        """The rows of these nodes and of their arms for this model, brought up to date."""
        asked = self._asked.get(id(nodes))
        if asked is None or asked.nodes is not nodes:
            asked = self._ask(nodes)
        entries = self._entries
        changed = [e for n in nodes if (e := entries[n.info.name]).version != n.version]
        for entry in changed:
            self._update(entry)
        self._lengths.refresh()  # after the in_flight have named the distributions they need, before they are read
        for entry in changed:
            f.predict(entry.row, self.nodes, self.arms, self.in_flight, self._lengths.table, self.maps)
        arms = asked.arms.get(model)
        if arms is None:
            arms = asked.arms[model] = np.array([self.arm(n, model) for n in nodes], np.int64)
        return asked.rows, arms

    def _ask(self, nodes: Sequence[Node]) -> _Asked:
        """Remember where a sequence of nodes is; the core asks with the same few again and again."""
        if len(self._asked) >= _REMEMBERED:
            self._asked.clear()
        entries = [self._entry(n) for n in nodes]
        if len(self._entries) > 2 * len(nodes) + 64 or self._replaced > len(self._entries) + 64:
            self.forget()  # mostly nodes that are gone
            entries = [self._entry(n) for n in nodes]
        asked = self._asked[id(nodes)] = _Asked(nodes, np.array([e.row for e in entries], np.int64))
        return asked

    def row(self, node: Node) -> int:
        """The row in `nodes` of a node that `rows` was asked for."""
        return self._entries[node.info.name].row

    def arm(self, node: Node, model: str | None) -> int:
        """The row in `arms` of a model on a node that `rows` was asked for."""
        first = self._entries[node.info.name].arm
        if model is None:
            return first
        return first + next(i for i, offer in enumerate(node.info.models) if offer.name == model)

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
            self.arms = np.concatenate([self.arms, np.zeros_like(self.arms)])
        if row == len(self.nodes):
            self.nodes = np.concatenate([self.nodes, np.zeros_like(self.nodes)])
            self.maps = np.concatenate([self.maps, np.zeros_like(self.maps)], axis=1)
        return entry

    def _update(self, entry: _Entry) -> None:
        node, learned = entry.node, self._learned(entry.node)
        for i, (offer, steps) in enumerate(zip(node.info.models, learned.steps, strict=True)):
            self.arms[entry.arm + i] = (*steps, offer.kv_tokens, 0.0)
        self._update_flights(entry)
        self.nodes[entry.row] = (
            entry.first,
            len(entry.ids),
            node.info.slots,
            node.heard,
            max(node.changed, node.heard),
            learned.watts,
            node.info.power.joules_per_byte,
            learned.rate,
            learned.latency,
            learned.dispatch_delay,
            learned.still,
            entry.arm,
            *learned.inflow,
            learned.toll,
            learned.pace,
            learned.steps[0][0],
            0.0,
        )
        entry.version = node.version

    def _update_flights(self, entry: _Entry) -> None:
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
                mine[i] = self._flight(entry, in_flight[ids[i]])
            entry.ids = ids
        n = len(ids)
        mine[:n, f.CLAIMED] = [t.claimed or 0.0 for t in in_flight.values()]
        if entry.heard != entry.node.heard:
            mine[:n, f.GENERATED] = [t.generated for t in in_flight.values()]
            entry.heard = entry.node.heard

    @staticmethod
    def _close_gaps(entry: _Entry, mine: Matrix, in_flight: dict[str, Task]) -> int:
        """Move the rows of those still there together; returns how many there are."""
        for gone in [task_id for task_id in entry.ids if task_id not in in_flight]:
            i, n = entry.ids.index(gone), len(entry.ids)
            mine[i : n - 1] = mine[i + 1 : n]
            del entry.ids[i]
        return len(entry.ids)

    def _flight(self, entry: _Entry, task: Task) -> tuple[float, ...]:
        given = (
            task.dispatched or 0.0,
            task.claimed or 0.0,
            task.generated,
            task.prompt_tokens,
            task.payload_bytes,
            task.deadline,
            task.max_tokens,
            task.value,
            self._lengths.row(task.service, task.prompt_tokens, task.expected_tokens, task.tenant),
            self.arm(entry.node, task.model),
        )
        return given + (0.0,) * (f.FLIGHT_COLUMNS - len(given))

    def _make_room(self, entry: _Entry, need: int) -> None:
        """Move a node's in_flight to where there is room for them (and some more) in a row."""
        room = max(2 * need, entry.node.info.slots + 4)
        while self._flights_used + room > len(self.in_flight):
            self.in_flight = np.concatenate([self.in_flight, np.zeros_like(self.in_flight)])
        old = self.in_flight[entry.first : entry.first + len(entry.ids)].copy()
        entry.first, entry.room = self._flights_used, room
        self.in_flight[entry.first : entry.first + len(old)] = old
        self._flights_used += room
