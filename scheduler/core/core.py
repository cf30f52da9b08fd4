"""The scheduler's core: events and a time in, decisions out.

No I/O, no clock, no Redis, no Celery. The live service and the simulator drive this same class, so what the simulator
shows is what the service does.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from broker.messages import (
    Candidate,
    Claimed,
    Completed,
    Dispatched,
    Ended,
    Event,
    Explanation,
    Heartbeat,
    NodeDown,
    NodeUp,
    Returned,
    Submitted,
)
from scheduler.core.cluster import Cluster, Node, Task
from scheduler.core.pending import Pending
from scheduler.core.policy import Place, Policy, Reject, Wait

#: Tasks one round may leave waiting before it ends: bounds a round's cost however long the backlog is.
LOOKAHEAD = 32


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one task, and why."""

    task: Task
    action: Literal["dispatch", "reject", "expire"]
    explanation: Explanation
    node: Node | None = None
    model: str | None = None


class Core:
    """Holds what is known of nodes and tasks and asks the policy where each pending task goes.

    `queue_beyond_slots` bounds the tasks a node holds to its slots plus that many (None: unbounded). `edf` orders
    pending tasks by deadline instead of arrival.
    """

    def __init__(self, policy: Policy, *, queue_beyond_slots: int | None = 2, edf: bool = True) -> None:
        self.policy = policy
        self.cluster = Cluster()
        self.pending = Pending(edf=edf)
        self._placed: dict[str, Task] = {}
        self._queue_beyond_slots = queue_beyond_slots

    def find(self, task_id: str) -> Task | None:
        """The unfinished task of this id, pending or placed."""
        return self.pending.get(task_id) or self._placed.get(task_id)

    # --- events in

    def handle(self, event: Event) -> None:
        """Take one event. Events about tasks or nodes not known are harmless; repeated ones change nothing."""
        task = None if isinstance(event, NodeUp | NodeDown | Heartbeat) else self.find(event.id)
        self.policy.observe(event, task, self.cluster)
        match event:
            case Submitted():
                if task is None:
                    self.pending.add(task_of(event))
            case Dispatched():
                if task is not None:
                    self._place(task, event.node, event.attempt, event.at)
            case Claimed():
                if task is not None and task.attempt == event.attempt:
                    task.claimed = event.at
            case Completed() | Ended():
                if task is not None:
                    self._take_out(task)
            case Returned():
                if task is not None and task.attempt == event.attempt:
                    self._put_back(task, event)
            case NodeUp():
                self._node_up(event)
            case Heartbeat():
                self._heartbeat(event)
            case NodeDown():
                # Its tasks stay known as placed; the ledger returns each in an event of its own.
                self.cluster.nodes.pop(event.node, None)
            case _:
                assert_never(event)

    def _place(self, task: Task, node_name: str, attempt: int, at: float) -> None:
        if task.node == node_name and task.attempt == attempt:
            return  # decided here, now confirmed by the stream
        self._take_out(task)
        task.node, task.attempt, task.dispatched, task.claimed, task.generated = node_name, attempt, at, None, 0
        self._placed[task.id] = task
        if node := self.cluster.nodes.get(node_name):
            node.flights[task.id] = task

    def _put_back(self, task: Task, event: Returned) -> None:
        self._take_out(task)
        if event.cause != "handed_back":
            task.avoid |= {event.node}
        task.node = task.dispatched = task.claimed = None
        task.generated, task.strikes = 0, event.strikes
        self.pending.add(task)

    def _take_out(self, task: Task) -> None:
        self.pending.remove(task.id)
        self._placed.pop(task.id, None)
        if task.node is not None and (node := self.cluster.nodes.get(task.node)):
            node.flights.pop(task.id, None)

    def _node_up(self, event: NodeUp) -> None:
        node = Node(event.info, since=event.at, heard=event.at)
        node.flights = {t.id: t for t in self._placed.values() if t.node == node.name}
        self.cluster.nodes[node.name] = node

    def _heartbeat(self, event: Heartbeat) -> None:
        node = self.cluster.nodes.get(event.node)
        if node is None or node.info.boot != event.boot:
            return
        node.counters, node.heard = event.counters, event.at
        for task_id, generated in event.progress.items():
            if flight := node.flights.get(task_id):
                flight.generated = generated

    # --- decisions out

    def decide(self, now: float) -> list[Decision]:
        """Decide the pending tasks that can be decided now, most urgent first. A task decided for a node counts as
        placed there at once; the stream's `Dispatched` event confirms it, `forget` or `take_back` undo it."""
        decisions: list[Decision] = []
        waiting: list[Task] = []
        while len(waiting) < LOOKAHEAD and (task := self.pending.pop()) is not None:
            decision = self._decide(task, now)
            if decision is None:
                waiting.append(task)
            else:
                decisions.append(decision)
        for task in waiting:
            self.pending.add(task)
        return decisions

    def forget(self, task: Task) -> None:
        """The ledger refused a decision about `task`: it is final, or somebody else placed it. If it still lives, the
        stream says where."""
        self._take_out(task)

    def take_back(self, task: Task) -> None:
        """The node `task` was just decided for is out of service; the stream says (or said) so too."""
        node_name = task.node
        self._take_out(task)
        task.node, task.dispatched, task.attempt = None, None, task.attempt - 1
        self.pending.add(task)
        if node_name is not None:
            self.cluster.nodes.pop(node_name, None)

    def keep_only(self, task_ids: Set[str]) -> None:
        """Forget every task not among these."""
        for task in [t for t in (*self.pending, *self._placed.values()) if t.id not in task_ids]:
            self._take_out(task)

    def _decide(self, task: Task, now: float) -> Decision | None:
        if task.deadline <= now:
            return self._end(task, "expire", "the deadline passed before a node could take it")
        candidates = [n for n in self.cluster.nodes.values() if self._can_take(n, task)]
        if not candidates:
            return self._never(task)
        choice = self.policy.choose(task, candidates, self.cluster, now)
        match choice:
            case Wait():
                return None
            case Reject(reason):
                looks = self.policy.explain(task, candidates, self.cluster, now)
                return self._end(task, "reject", reason, looks)
            case Place(name):
                looks = self.policy.explain(task, candidates, self.cluster, now)
                node = self.cluster.nodes[name]
                offer = node.info.offer(task.model)
                assert offer is not None  # only nodes that offer the model are candidates
                self._place(task, name, task.attempt + 1, now)
                sentence = self._sentence(name, looks, len(candidates))
                explanation = Explanation(
                    policy=self.policy.name, action="dispatch", sentence=sentence, node=name, candidates=looks
                )
                return Decision(task, "dispatch", explanation, node, offer.name)
            case _:
                assert_never(choice)

    def _can_take(self, node: Node, task: Task) -> bool:
        if not serves(node, task):
            return False
        if self._queue_beyond_slots is not None and len(node.flights) >= node.info.slots + self._queue_beyond_slots:
            return False
        return node.name not in task.avoid or not self._alternatives(task)

    def _alternatives(self, task: Task) -> bool:
        """Whether a node it has not failed on serves it: only then are the others avoided."""
        return any(n.name not in task.avoid and serves(n, task) for n in self.cluster.nodes.values())

    def _never(self, task: Task) -> Decision | None:
        """No node can take it now. Wait, unless live nodes serve its model and none could ever hold it."""
        offers = [o for n in self.cluster.nodes.values() if (o := n.info.offer(task.model))]
        if not offers or any(fits(o.context, task) for o in offers):
            return None
        need, most = task.prompt_tokens + task.max_tokens, max(o.context for o in offers)
        return self._end(
            task, "reject", f"prompt and max_tokens need about {need} tokens; the largest context offered is {most}"
        )

    def _end(
        self, task: Task, action: Literal["reject", "expire"], reason: str, looks: tuple[Candidate, ...] = ()
    ) -> Decision:
        return Decision(
            task, action, Explanation(policy=self.policy.name, action=action, sentence=reason, candidates=looks)
        )

    def _sentence(self, chosen: str, looks: tuple[Candidate, ...], count: int) -> str:
        mine = next((c for c in looks if c.node == chosen), None)
        note = f": {mine.note}" if mine and mine.note else ""
        return f"{chosen} was the best of {count} candidate node{'s' if count != 1 else ''}{note}"

    # --- state kept over a restart

    def snapshot(self) -> dict[str, Any]:
        """What was learned, as JSON-able data. Tasks and nodes are not in it: the ledger knows them."""
        return {"policy": self.policy.name, "state": self.policy.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a snapshot of the same policy. Raises ValueError for another policy's."""
        if state.get("policy") != self.policy.name:
            raise ValueError(f"the snapshot is of policy {state.get('policy')!r}, not {self.policy.name!r}")
        self.policy.restore(state["state"])


def task_of(event: Submitted) -> Task:
    """The task a `Submitted` event describes."""
    return Task(
        id=event.id,
        submitted=event.at,
        deadline=event.deadline,
        value=event.value,
        service=event.service,
        model=event.model,
        prompt_tokens=event.prompt_tokens,
        payload_bytes=event.payload_bytes,
        max_tokens=event.max_tokens,
        expected_tokens=event.expected_tokens,
        strikes=event.strikes,
    )


def fits(context: int, task: Task) -> bool:
    """Whether a context of so many tokens could hold the task. The prompt is an estimate, so only half of it must
    fit here; the engine, which counts exactly, has the last word."""
    return task.prompt_tokens // 2 + 1 < context


def serves(node: Node, task: Task) -> bool:
    """Whether the node offers the task's model with a context that may hold it."""
    offer = node.info.offer(task.model)
    return offer is not None and fits(offer.context, task)
