"""The scheduler without its I/O: events and a time in, decisions out.

No I/O, no clock, no Redis, no Celery. The live service and the simulator drive this same class, so what the simulator
shows is what the service does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

from perllm.broker.capabilities import unserved
from perllm.broker.messages import (
    Candidate,
    Claimed,
    Completed,
    Dispatched,
    Ended,
    Event,
    Explanation,
    Heartbeat,
    ModelOffer,
    NodeDown,
    NodeInfo,
    NodeUp,
    Returned,
    Submitted,
)
from perllm.broker.text_features import parse
from perllm.scheduler.core.cluster import MAX_DEMANDS, Cluster, Demand, Group, Node, Task
from perllm.scheduler.core.pending import Pending
from perllm.scheduler.core.policy import Place, Policy, Reject, Wait
from perllm.scheduler.core.task_groups import TaskGroups

#: Tasks for the same nodes a round may leave waiting before it goes on to others (as the look-ahead of a backfilling
#: scheduler); of those that can wait for LONG_WAIT seconds or more, MAX_LONG_WAITS are enough, since they make way for
#: the next in the round after; of those parked before, MAX_RETRIES, the most promising first. All bound a round's cost
#: however long the backlog is.
LOOKAHEAD, MAX_LONG_WAITS, MAX_RETRIES = 32, 2, 1
LONG_WAIT = 1.0
#: A node that finishes tasks quickly may hold this many seconds' worth beyond its slots, up to MAX_QUEUE, so that it
#: never idles for as long as a decision takes to reach it.
QUEUE_SECONDS = 0.05
MAX_QUEUE = 64
#: Version of what `SchedulerCore.snapshot` returns, with the policies' parts: to be raised when a field changes.
SNAPSHOT_FORMAT = 3
#: A task avoids a node that lost it for so long, s, while others serve it: long enough that a node which fails all it
#: is given takes few tasks' strikes, short enough not to leave one idle that has recovered.
AVOID_SECONDS = 15.0
#: What no live node can do is refused, once that has been so for a moment in which nodes may start, s; or, where a node
#: that is gone could, for a time in which it may come back.
AWAIT_NODES, AWAIT_RETURN = 10.0, 600.0
#: Nodes that are gone and are remembered.
MAX_GONE = 256
#: Tasks refused in a round at most, for all that no live node can do.
MAX_REFUSED = 256
#: Excluded nodes an explanation names.
MAX_EXCLUDED = 8


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one task, and why."""

    task: Task
    action: Literal["dispatch", "reject", "expire"]
    explanation: Explanation
    node: Node | None = None
    model: str | None = None
    failure: bool = False  # it could not be decided: a fault of ours
    reason: str = "best"  # the kind of it, one of few


@dataclass(frozen=True, slots=True)
class Lapse:
    """Tasks their node does not take up, to be placed anew, and why. `distrust`: so is whatever else it is sent."""

    node: Node
    tasks: tuple[Task, ...]
    reason: str
    distrust: bool


class SchedulerCore:
    """Holds what is known of nodes and tasks and asks the policy where each pending task goes.

    `queue_beyond_slots` bounds the tasks a node holds to its slots plus that many, or QUEUE_SECONDS' worth (None:
    unbounded). `edf` orders pending tasks by deadline instead of arrival. Without `explain`, decisions carry no
    candidates, which saves time where nobody reads them. With `reject_on_error`, a task the policy fails on is rejected
    and says so, and the others are decided; without, the failure is raised.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        queue_beyond_slots: int | None = 2,
        edf: bool = True,
        explain: bool = True,
        reject_on_error: bool = False,
    ) -> None:
        self.policy = policy
        self.cluster = Cluster()
        self.pending = Pending(edf=edf)
        self.groups = TaskGroups(self.knows_model)
        self.decided: Counter[tuple[str, str]] = Counter()  # action and kind of reason → decisions, waiting included
        self._placed: dict[str, Task] = {}
        self._queue_beyond_slots = queue_beyond_slots
        self._explain, self._reject_on_error = explain, reject_on_error
        self._rooms = 0  # grows when a node gets or loses room
        self._freed: set[str] = set()  # nodes that have room since the last round …
        self._idle: set[str] = set()  # … and those that beat with nothing to do
        self._rescan_all = False
        self._gone: dict[str, tuple[NodeInfo, float]] = {}  # nodes, and when they went (s)
        self._distrusted: dict[str, Node] = {}
        self._unserved: dict[Demand, float] = {}  # demands no live node serves, since when (s)
        self._models: set[str] | None = None  # that live or gone nodes have; None: not worked out
        self._excluded: dict[Demand, tuple[tuple[Node, str], ...]] = {}  # nodes that lack something, and what

    def find(self, task_id: str) -> Task | None:
        """The unfinished task of this id, pending or placed."""
        return self._placed.get(task_id) or self.pending.get(task_id)

    # --- events in

    def handle(self, event: Event) -> None:
        """Take one event. Events about tasks or nodes not known are harmless; repeated ones change nothing."""
        task = None if isinstance(event, NodeUp | NodeDown | Heartbeat) else self.find(event.id)
        self.policy.observe(event, task, self.cluster)
        match event:
            case Submitted():
                if task is None:
                    task = task_of(event)
                    task.group = self.groups.number(task.tenant, task.service, task.model, event.at)
                    self.pending.add(task)
            case Dispatched():
                if task is not None:
                    self._place(task, event.node, event.attempt, event.at)
            case Claimed():
                if task is not None and task.attempt == event.attempt:
                    task.claimed = event.at  # about when the forecast has it: no reason to look at the node anew
                    if node := self.cluster.nodes.get(event.node):
                        node.took_up(task, event.at)
                        self._note_room(node, event.at)
            case Completed():
                if task is not None:
                    self._finished(task, event)
            case Ended():
                if task is not None:
                    self._take_out(task, event.at)
            case Returned():
                if task is not None and task.attempt == event.attempt:
                    self._put_back(task, event)
            case NodeUp():
                self._node_up(event)
            case Heartbeat():
                self._heartbeat(event)
            case NodeDown():
                # Its tasks stay known as placed; the ledger returns each in an event of its own.
                self._node_down(event.node, event.at)
            case _:
                assert_never(event)

    def _place(self, task: Task, node_name: str, attempt: int, at: float) -> None:
        if task.node == node_name and task.attempt == attempt:
            return  # decided here, now confirmed by the stream
        self._take_out(task, at)
        task.node, task.attempt, task.dispatched, task.claimed, task.generated = node_name, attempt, at, None, 0
        self._placed[task.id] = task
        if node := self.cluster.nodes.get(node_name):
            node.hold(task, at)
            node.touch(at)
            self._note_room(node, at)

    def _finished(self, task: Task, event: Completed) -> None:
        if node := self.cluster.nodes.get(event.node):
            node.completed(event.at)
        self._take_out(task, event.at)

    def _put_back(self, task: Task, event: Returned) -> None:
        self._take_out(task, event.at)
        if event.cause != "handed_back":
            task.avoid = {**task.avoid, event.node: event.at + AVOID_SECONDS}
        task.node = task.dispatched = task.claimed = None
        task.generated, task.strikes = 0, event.strikes
        self.pending.add(task)

    def _take_out(self, task: Task, at: float) -> None:
        self.pending.remove(task.id)
        self._placed.pop(task.id, None)
        if task.node is None or (node := self.cluster.nodes.get(task.node)) is None:
            return
        if node.release(task.id, at):
            node.touch(at)
            self._note_room(node, at)
            self._freed.add(node.name)

    # --- nodes

    def _node_up(self, event: NodeUp) -> None:
        mine = {t.id: t for t in self._placed.values() if t.node == event.info.name}
        node = Node(event.info, since=event.at, heard=event.at, changed=event.at, in_flight=mine)
        self._note_room(node, event.at)
        self.cluster.nodes[node.name] = node
        self._gone.pop(node.name, None)
        self._nodes_changed()
        self._freed.add(node.name)

    def _node_down(self, name: str, at: float) -> None:
        if (node := self.cluster.nodes.pop(name, None)) is not None:
            self._distrusted.pop(name, None)
            self.remember(node.info, at)
            self._nodes_changed()
            self._rescan_all = True  # a task may now go where it avoided to go

    def remember(self, info: NodeInfo, at: float) -> None:
        """A node was there until `at` (s), and may come back."""
        self._gone[info.name] = info, at
        self._models = None
        if len(self._gone) > MAX_GONE:
            del self._gone[min(self._gone, key=lambda name: self._gone[name][1])]

    @property
    def known_nodes(self) -> Set[str]:
        """Those that are live, and those that were and may come back."""
        return self.cluster.nodes.keys() | self._gone.keys()

    def knows_model(self, name: str) -> bool:
        """Whether a node that is live, or was, has it."""
        if self._models is None:
            infos = (*(node.info for node in self.cluster.nodes.values()), *(info for info, _ in self._gone.values()))
            self._models = {offer.name for info in infos for offer in info.models}
        return name in self._models

    def _nodes_changed(self) -> None:
        self._models = None
        self.cluster.changed()
        self._excluded.clear()
        self._rooms += 1

    def _heartbeat(self, event: Heartbeat) -> None:
        node = self.cluster.nodes.get(event.node)
        if node is None or node.info.boot != event.boot:
            return
        node.counters, node.heard = event.counters, event.at
        for task_id, generated in event.progress.items():
            if task := node.in_flight.get(task_id):
                task.generated = generated
        node.touch(event.at)
        if not node.in_flight:  # idle: what waits beside it is tried again, as slot prices and expected arrivals fade
            self._idle.add(node.name)

    def _note_room(self, node: Node, now: float) -> None:
        """Its tasks, or the trust in it, have changed: it may be full now, or no longer."""
        beyond = self._queue_beyond_slots
        node.quick = min(MAX_QUEUE, int(node.completion_rate * (QUEUE_SECONDS + (node.pace.mean or 0.0))))
        if beyond is not None:
            beyond = max(beyond, node.quick)
        has_room = beyond is None or node.taken < node.info.slots + beyond
        has_room = has_room and node.pace.trusts(len(node.unclaimed), now)
        if bool(node.pace.distrust) != (node.name in self._distrusted):
            node.touch(now)  # for whoever waits for it
        if node.pace.distrust:
            self._distrusted[node.name] = node
        else:
            self._distrusted.pop(node.name, None)
        if has_room != node.has_room:
            node.has_room = has_room
            self.cluster.room_changed(node.name)
            self._rooms += 1
            if has_room:
                self._freed.add(node.name)

    def _begin_scans(self) -> None:
        """Parked tasks are tried again where something has changed for them since the last round."""
        if not (self._freed or self._idle or self._rescan_all):
            return
        groups = [(demand, self.cluster.group(demand)) for demand in self.pending.demands]
        freed = [d for d, group in groups if self._rescan_all or not group.names.isdisjoint(self._freed)]
        self.pending.rescan(freed)
        if self._idle:
            anew = set(freed)
            self.pending.continue_scan(
                d for d, group in groups if d not in anew and not group.names.isdisjoint(self._idle)
            )
        self._freed.clear()
        self._idle.clear()
        self._rescan_all = False

    # --- nodes that do not take up what they are sent

    def lapses(self, now: float) -> list[Lapse]:
        """Tasks dispatched and not claimed within what their node's own pace explains. Nodes that take up nothing are
        distrusted from here on; to be asked every so often, also so that they are tried again in time."""
        found = []
        for node in self.cluster.nodes.values():
            if lost := node.lost():
                found.append(Lapse(node, tuple(lost), f"{node.name} took up later ones and not this", distrust=False))
            elif now >= node.pace.rests_until and (waited := node.idles()) is not None:
                reason = f"{node.name} had room for {waited:.1f} s and did not take it up"
                node.pace.lapsed(now, f"for {waited:.1f} s it took up none of {len(node.unclaimed)}")
                found.append(Lapse(node, tuple(node.unclaimed.values()), reason, distrust=True))
                self._note_room(node, now)
            elif node.pace.distrust:
                self._note_room(node, now)
        return found

    def distrust(self, name: str, reason: str, now: float) -> None:
        """The leader before distrusted a node."""
        if node := self.cluster.nodes.get(name):
            node.pace.distrusted(reason)
            self._note_room(node, now)

    # --- decisions out

    def decide(self, now: float) -> list[Decision]:
        """Decide the pending tasks that can be decided now, most urgent first. A task decided for a node counts as
        placed there at once; the stream's `Dispatched` event confirms it, `forget` or `take_back` undo it."""
        decisions = []
        for late in self.pending.wake_due(now):
            self.pending.remove(late.id)
            decisions.append(self._end(late, "expire", "deadline", "the deadline passed before a node could take it"))
        self.cluster.waiting = self.pending.awake
        decisions += self._refuse_unserved(now)
        self._begin_scans()
        waiting: list[tuple[Task, Wait]] = []
        lanes = _OpenLanes(self.cluster, self.pending)
        rooms = -1
        while True:
            if self._rooms != rooms:
                rooms = self._rooms
                lanes.find()
            taken = self.pending.take(lanes.fresh, lanes.parked)
            if taken is None:
                break
            task, was_parked = taken
            try:
                decided = self._decide(task, now)
            except Exception as error:
                if not self._reject_on_error:
                    raise
                self._take_out(task, now)
                reason = f"the policy failed on it: {type(error).__name__}: {error}"
                decisions.append(replace(self._end(task, "reject", "failure", reason), failure=True))
                continue
            if isinstance(decided, Decision):
                self.pending.remove(task.id)
                decisions.append(decided)
            else:
                waiting.append((task, decided))
                self.decided["wait", "hopeless" if decided.hopeless else "not_worth_it_now"] += 1
                waits_long = decided.until is not None and decided.until - now >= LONG_WAIT
                lanes.waits(task.demand, was_parked=was_parked, long=waits_long)
        for task, wait in waiting:
            if wait.until is None:
                self.pending.put_back(task)
            else:
                self.pending.park(task, wait.until, wait.rank)
        self.pending.end_scan(lanes.with_room)
        self.decided.update((decision.action, decision.reason) for decision in decisions)
        return decisions

    def _refuse_unserved(self, now: float) -> list[Decision]:
        """The end of tasks that need what no live node can do, once that has been so for long enough. Those whose model
        is on no live node wait for it, and all do while no node is live."""
        if not self.cluster.nodes:
            self._unserved.clear()
            return []
        lacking = [d for d in self.pending.demands if d.needs and not self.cluster.serving(d)]
        self._unserved = {demand: self._unserved.get(demand, now) for demand in lacking}
        decisions: list[Decision] = []
        for demand in lacking:
            reason = self._refusal(demand, now)
            if reason is None:
                continue
            self.pending.rescan([demand])
            while len(decisions) < MAX_REFUSED and (taken := self.pending.take([demand], [demand])):
                self.pending.remove(taken[0].id)
                decisions.append(self._end(taken[0], "reject", "capability", reason))
        return decisions

    def _refusal(self, demand: Demand, now: float) -> str | None:
        """Why tasks that no live node serves are refused now; None: not yet."""
        live = [offer for node in self.cluster.nodes.values() for offer in node.info.models]
        if demand.model is not None and not any(offer.name == demand.model for offer in live):
            return None
        for info, at in self._gone.values():
            if now - at < AWAIT_RETURN and info.offer(*demand) is not None:
                return None
        if now - self._unserved[demand] < AWAIT_NODES:
            return None
        gone = [offer for info, _ in self._gone.values() for offer in info.models]
        return unserved(demand.model, demand.needs, live, gone)

    def forget(self, task: Task) -> None:
        """The ledger refused a decision about `task`: it is final, or somebody else placed it. If it still lives, the
        stream says where."""
        self._take_out(task, task.dispatched or 0.0)

    def take_back(self, task: Task) -> None:
        """The node `task` was just decided for is out of service; the stream says (or said) so too."""
        node_name = task.node
        self.forget(task)
        task.node, task.dispatched, task.attempt = None, None, task.attempt - 1
        self.pending.add(task)
        if node_name is not None and (node := self.cluster.nodes.get(node_name)) is not None:
            self._node_down(node_name, max(node.heard, node.changed))

    def keep_only(self, task_ids: Set[str]) -> None:
        """Forget every task not among these."""
        for task in [t for t in (*self.pending, *self._placed.values()) if t.id not in task_ids]:
            self.forget(task)

    def _decide(self, task: Task, now: float) -> Decision | Wait:
        candidates = self._candidates(task, now)
        if not candidates:
            return self._never(task, now)
        choice = self.policy.choose(task, candidates, self.cluster, now)
        if isinstance(choice, Wait) and choice.hopeless and task.avoid:
            candidates = self._able(task)
            choice = self.policy.choose(task, candidates, self.cluster, now)
        if isinstance(choice, Wait):
            return choice
        scores: tuple[Candidate, ...] = ()
        if self._explain:
            scores = (*self.policy.explain(task, candidates, self.cluster, now), *self._excluded_from(task))
        length = self.policy.forecast_length(task) if self._explain else None
        match choice:
            case Reject(reason):
                return self._end(task, "reject", "no_time", reason, scores)
            case Place(name):
                node = self.cluster.nodes[name]
                offer = node.offer(task.demand)
                assert offer is not None  # only nodes that serve the task are candidates
                self._place(task, name, task.attempt + 1, now)
                sentence = self._sentence(task, name, scores, len(candidates), now)
                explanation = Explanation(
                    policy=self.policy.name,
                    action="dispatch",
                    sentence=sentence,
                    node=name,
                    candidates=scores,
                    length=length,
                )
                reason = "best" if len(candidates) > 1 else "only_one"
                return Decision(task, "dispatch", explanation, node, offer.name, reason=reason)
            case _:
                assert_never(choice)

    def _candidates(self, task: Task, now: float) -> tuple[Node, ...]:
        """Nodes with room that can hold the task and, if any others serve it, did not lose it lately."""
        nodes = self._able(task)
        if task.avoid and self._alternatives(task, now):
            nodes = tuple(n for n in nodes if not task.avoids(n.name, now))
        return nodes

    def _able(self, task: Task) -> tuple[Node, ...]:
        """Nodes with room that can hold the task."""
        nodes = self.cluster.with_room(task.demand)
        if not fits(self.cluster.group(task.demand).least_context, task):
            nodes = tuple(n for n in nodes if serves(n, task))
        return nodes

    def _alternatives(self, task: Task, now: float) -> bool:
        """Whether a node it has not failed on serves it: only then are the others avoided."""
        serving = self.cluster.serving(task.demand)
        return any(not task.avoids(n.name, now) and serves(n, task) for n in serving)

    def _never(self, task: Task, now: float) -> Decision | Wait:
        """No node can take it now. Wait for room, or until it need not avoid a node any more, unless live nodes serve
        it and none could ever hold it."""
        offers = [o for n in self.cluster.serving(task.demand) if (o := n.offer(task.demand))]
        if not offers or any(fits(o.context, task) for o in offers):
            return Wait(until=min([task.deadline, *(u for u in task.avoid.values() if u > now)]))
        need, most = task.prompt_tokens + task.least_output, max(o.context for o in offers)
        what = "its prompt needs" if task.fit_context else "prompt and max_tokens need"
        return self._end(
            task,
            "reject",
            "context",
            f"{what} about {need} tokens; the largest context offered is {most}",
            self._excluded_from(task),
        )

    def _excluded_from(self, task: Task) -> tuple[Candidate, ...]:
        """The nodes that are no candidates for want of a capability or of context, some of them, and why."""
        demand = task.demand
        lacking = self._excluded.get(demand)
        if lacking is None:
            if len(self._excluded) >= MAX_DEMANDS:
                self._excluded.clear()
            lacking = self._excluded[demand] = tuple(_lacking(self.cluster, demand))
        excluded = list(lacking)
        if not fits(self.cluster.group(demand).least_context, task):
            for node in self.cluster.serving(demand):
                offer = node.offer(demand)
                if len(excluded) < MAX_EXCLUDED and offer is not None and not fits(offer.context, task):
                    excluded.append((node, f"its context of {offer.context} tokens is too short"))
        for node in self._distrusted.values():
            offer = node.offer(demand)
            if len(excluded) < MAX_EXCLUDED and not node.has_room and offer is not None and fits(offer.context, task):
                excluded.append((node, f"distrusted: {node.pace.distrust}"))
        return tuple(Candidate(node=node.name, feasible=False, note=note) for node, note in excluded)

    def _end(
        self,
        task: Task,
        action: Literal["reject", "expire"],
        reason: str,
        sentence: str,
        scores: tuple[Candidate, ...] = (),
    ) -> Decision:
        why = Explanation(policy=self.policy.name, action=action, sentence=sentence, candidates=scores)
        return Decision(task, action, why, reason=reason)

    def _sentence(self, task: Task, chosen: str, scores: tuple[Candidate, ...], count: int, now: float) -> str:
        sentence = f"{chosen} was the best of {count} candidate node{'s' if count != 1 else ''}"
        mine = next((c for c in scores if c.node == chosen), None)
        if mine is None:
            return sentence
        if mine.note:
            return f"{sentence}: {mine.note}"
        if mine.finish is None or mine.p_on_time is None or mine.marginal_energy is None:
            return sentence
        left = task.deadline - now
        return (
            f"{sentence}: done in about {mine.finish:.1f} s of {left:.1f} s, {mine.p_on_time:.0%} on time, "
            f"{mine.marginal_energy:.3g} J"
        )

    # --- state kept over a restart

    def snapshot(self) -> dict[str, Any]:
        """What was learned, as JSON-able data. Tasks and nodes are not in it: the ledger knows them."""
        return {"format": SNAPSHOT_FORMAT, "policy": self.policy.name, "state": self.policy.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a snapshot of the same policy. Raises ValueError for another policy's or another release's, and
        whatever the policy raises for one that it cannot read; nothing has changed then."""
        if state.get("format") != SNAPSHOT_FORMAT:
            raise ValueError(f"the snapshot has format {state.get('format')}, this release reads {SNAPSHOT_FORMAT}")
        if state.get("policy") != self.policy.name:
            raise ValueError(f"the snapshot is of policy {state.get('policy')!r}, not {self.policy.name!r}")
        self.policy.restore(state["state"])


class _OpenLanes:
    """The lanes of the pending pool a round may still take tasks from: those with room on a node that serves them,
    until tasks for the same nodes have waited often enough."""

    def __init__(self, cluster: Cluster, pending: Pending) -> None:
        self._cluster, self._pending = cluster, pending
        self._waits: dict[tuple[Group, bool], float] = {}
        self.with_room: list[Demand] = []
        self.fresh: list[Demand] = []
        self.parked: list[Demand] = []

    def find(self) -> None:
        """Look anew: room has changed."""
        self.with_room = [demand for demand in self._pending.demands if self._cluster.with_room(demand)]
        self._choose()

    def _choose(self) -> None:
        groups = [(demand, self._cluster.group(demand)) for demand in self.with_room]
        self.fresh = [d for d, group in groups if self._waits.get((group, False), 0) < LOOKAHEAD]
        self.parked = [d for d, group in groups if self._waits.get((group, True), 0) < MAX_RETRIES]

    def waits(self, demand: Demand, *, was_parked: bool, long: bool) -> None:
        """A task was left waiting."""
        cost = LOOKAHEAD / MAX_LONG_WAITS if long and not was_parked else 1
        key = self._cluster.group(demand), was_parked
        self._waits[key] = self._waits.get(key, 0) + cost
        if self._waits[key] >= (MAX_RETRIES if was_parked else LOOKAHEAD):
            self._choose()


def _lacking(cluster: Cluster, demand: Demand) -> Iterable[tuple[Node, str]]:
    """Nodes that offer the model, or any where any will do, and lack something that is needed; and what."""
    if not demand.needs:
        return
    names, count = cluster.group(demand).names, 0
    for node in cluster.nodes.values():
        if node.name not in names and (lacks := _least_lack(node.info.models, demand)):
            yield node, f"cannot do: {', '.join(lacks)}"
            count += 1
            if count == MAX_EXCLUDED:
                return


def _least_lack(offers: Iterable[ModelOffer], demand: Demand) -> list[str]:
    """What the model that comes nearest lacks; nothing where the node does not have the model that is asked for."""
    lacks = (offer.lacks(demand.needs) for offer in offers if demand.model in (None, offer.name))
    return min(lacks, key=len, default=[])


def task_of(event: Submitted) -> Task:
    """The task a `Submitted` event describes."""
    return Task(
        id=event.id,
        submitted=event.at,
        deadline=event.deadline,
        value=event.value,
        service=event.service,
        tenant=event.tenant,
        demand=Demand(event.model, event.needs),
        prompt_tokens=event.prompt_tokens,
        payload_bytes=event.payload_bytes,
        max_tokens=event.max_tokens if event.kind == "generate" else 0,
        fit_context=event.fit_context,
        n=event.n,
        expected_tokens=event.expected_tokens,
        text=parse(event.text),
        start=event.at + event.start_after,
        strikes=event.strikes,
        attempt=event.attempt,
        origin=event.origin,
    )


def fits(context: int, task: Task) -> bool:
    """Whether a context of so many tokens could hold the task."""
    return task.least_context <= context


def serves(node: Node, task: Task) -> bool:
    """Whether the node can do what the task needs, with a context that may hold it."""
    offer = node.offer(task.demand)
    return offer is not None and fits(offer.context, task)
