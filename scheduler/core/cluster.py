"""What the scheduler knows of the cluster: nodes and the tasks on them. Plain state, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp
from typing import Any, NamedTuple

from perllm.broker.capabilities import lacking
from perllm.broker.messages import Counters, ModelOffer, NodeInfo
from perllm.broker.text_features import Sketch
from perllm.scheduler.core.pace import Pace

#: Time constant of a node's completion rate, s.
COMPLETION_WINDOW = 1.0
#: Demands whose nodes are remembered.
MAX_DEMANDS = 16_384


class Demand(NamedTuple):
    """What a task asks of a node: a model (None: any) that can do all of these (`broker.capabilities`)."""

    model: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(slots=True)
class Task:
    """One unfinished task, as submitted, and where it is. Times are the ledger server's clock, s."""

    id: str
    submitted: float
    deadline: float
    value: float  # of being on time
    service: str  # class of service
    demand: Demand  # of a node
    prompt_tokens: int  # estimated
    payload_bytes: int
    max_tokens: int  # of each answer; 0: it generates nothing, its inputs are embedded or ranked
    tenant: str = "default"
    fit_context: bool = False  # it may end where the context does; its `max_tokens` is not the producer's
    n: int = 1  # answers
    expected_tokens: int | None = None  # the producer's hint
    text: Sketch = b""
    start: float = 0.0  # it is not to be placed before
    strikes: int = 0
    attempt: int = 0  # of the last one
    group: int = 0  # number of what it is summed up with (`core.task_groups`)
    origin: Mapping[Any, str] = field(default_factory=dict)  # what lines of a log say of where it comes from
    # Set while it is placed
    node: str | None = None
    dispatched: float | None = None
    claimed: float | None = None
    generated: int = 0  # tokens of all answers, as of the node's last heartbeat
    avoid: Mapping[str, float] = field(default_factory=dict)  # nodes that lost it, until when they are avoided (s)

    @property
    def generates(self) -> bool:
        return self.max_tokens > 0

    @property
    def most_output(self) -> float:
        """Tokens of output at most, as a forecast counts steps: half a one where there is none, for it has its result
        at a step's end."""
        return self.max_tokens or 0.5

    @property
    def model(self) -> str | None:
        """The one it names."""
        return self.demand.model

    @property
    def least_output(self) -> int:
        """Tokens of output there must be room for."""
        return 1 if self.fit_context else self.max_tokens

    @property
    def least_context(self) -> int:
        """Tokens of context it must have. The prompt is an estimate, so only half of it must fit; the engine, which
        counts exactly, has the last word. Of inputs to embed each must fit, which the engine alone sees."""
        return self.prompt_tokens // 2 + self.least_output if self.generates else 0

    def avoids(self, node: str, now: float) -> bool:
        """Whether it lost an attempt on this node lately."""
        return self.avoid.get(node, 0.0) > now


@dataclass(slots=True)
class Node:
    """One registered node and the tasks on it. Times are the ledger server's clock, s.

    `version` grows with every change to the node or its tasks, so that what a policy derives from them can be kept
    until then; `changed` is when that was (s).
    """

    info: NodeInfo
    since: float  # s, when it registered
    counters: Counters = field(default_factory=Counters)  # the engine's totals, as of the last heartbeat …
    heard: float = 0.0  # … and when that was, s
    in_flight: dict[str, Task] = field(default_factory=dict)  # dispatched or running here, oldest first
    taken: int = 0  # slots they take or wait for: one for each answer, and no more than there are
    unclaimed: dict[str, Task] = field(default_factory=dict)  # those of them it has not taken up
    free_since: float = 0.0  # when it could last claim again, having run as many as it has slots, s
    last_claim: tuple[float, float] = (0.0, 0.0)  # when it last claimed, and when that was dispatched, s
    pace: Pace = field(default_factory=Pace)
    version: int = 0
    changed: float = 0.0
    completion_rate: float = 0.0  # tasks/s it finished lately, as of `completed_at`
    completed_at: float = 0.0  # when it last finished one, s
    quick: int = 0  # tasks beyond its slots that it works through in a moment
    has_room: bool = True  # for one more task, in its slots or its queue

    def __post_init__(self) -> None:
        self.taken = sum(min(task.n, self.info.slots) for task in self.in_flight.values())
        self.unclaimed = {task.id: task for task in self.in_flight.values() if task.claimed is None}

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def running(self) -> int:
        """Tasks it has taken up."""
        return len(self.in_flight) - len(self.unclaimed)

    def offer(self, demand: Demand) -> ModelOffer | None:
        """The model here that serves such tasks."""
        return self.info.offer(*demand)

    def hold(self, task: Task, at: float) -> None:
        """A task was sent here."""
        self.release(task.id, at)
        self.in_flight[task.id] = self.unclaimed[task.id] = task
        self.taken += min(task.n, self.info.slots)

    def release(self, task_id: str, at: float) -> bool:
        """A task is not here any more. Whether it was."""
        task = self.in_flight.pop(task_id, None)
        if task is None:
            return False
        self.taken -= min(task.n, self.info.slots)
        if self.unclaimed.pop(task_id, None) is None and self.running == self.info.slots - 1:
            self.free_since = max(self.free_since, at)
        return True

    def completed(self, at: float) -> None:
        """Note that it finished a task: the completion rate fades with COMPLETION_WINDOW."""
        fade = exp(-max(0.0, at - self.completed_at) / COMPLETION_WINDOW)
        self.completion_rate = self.completion_rate * fade + 1 / COMPLETION_WINDOW
        self.completed_at = at

    def took_up(self, task: Task, at: float) -> None:
        """Note that it claimed a task."""
        if self.unclaimed.pop(task.id, None) is None or task.dispatched is None:
            return
        self.pace.claimed(max(at - self._could_claim(task), 0.0), self.info.slots)
        self.last_claim = (at, task.dispatched)

    def lost(self) -> list[Task]:
        """Tasks that later ones have overtaken, as their messages must have been lost."""
        overtaken = self.last_claim[1] - self.pace.patience
        return [t for t in self.unclaimed.values() if t.dispatched is not None and t.dispatched < overtaken]

    def idles(self) -> float | None:
        """How long, as of its last heartbeat, it has not taken up what it has a slot for, s; None where its own pace
        explains it."""
        if not self.unclaimed or self.running >= self.info.slots:
            return None
        waited = self.heard - self._could_claim(next(iter(self.unclaimed.values())))
        return waited if waited > self.pace.patience else None

    def _could_claim(self, task: Task) -> float:
        """Since when it could have claimed a task, in its turn."""
        return max(task.dispatched or 0.0, self.free_since, self.last_claim[0], self.since)

    def touch(self, at: float) -> None:
        """Note a change."""
        self.version += 1
        self.changed = max(self.changed, at)


@dataclass(slots=True, eq=False)
class Group:
    """The nodes that serve a demand, in order of registration, each by one of its models."""

    nodes: tuple[Node, ...]
    names: frozenset[str]  # of the nodes
    least_context: int  # tokens, of those models
    with_room: tuple[Node, ...] | None = None  # None: not worked out


@dataclass(slots=True)
class Cluster:
    """All live nodes by name. Iteration order is registration order, so decisions are reproducible."""

    nodes: dict[str, Node] = field(default_factory=dict)
    waiting: int = 0  # pending tasks that might be placed, when the round began
    _by_demand: dict[Demand, Group] = field(default_factory=dict)
    _groups: dict[tuple[tuple[str, str], ...], Group] = field(default_factory=dict)  # by nodes and models
    _kinds: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)  # models on offer and what they can do

    def group(self, demand: Demand) -> Group:
        """Who serves such tasks. Demands that the same models on the same nodes serve have one group together."""
        group = self._by_demand.get(demand)
        if group is None:
            if len(self._by_demand) >= MAX_DEMANDS:
                self.changed()
            group = self._by_demand[demand] = self._find(demand)
        return group

    def _find(self, demand: Demand) -> Group:
        if not self._kinds:
            self._kinds = {(o.name, o.capabilities) for node in self.nodes.values() for o in node.info.models}
        model, needs = demand
        served = any(model in (None, name) and not lacking(needs, able) for name, able in self._kinds)
        nodes = self.nodes.values() if served else ()
        serving = [(node, offer) for node in nodes if (offer := node.offer(demand)) is not None]
        key = tuple((node.name, offer.name) for node, offer in serving)
        if (group := self._groups.get(key)) is None:
            least = min((offer.context for _, offer in serving), default=0)
            names = frozenset(node.name for node, _ in serving)
            group = self._groups[key] = Group(tuple(node for node, _ in serving), names, least)
        return group

    def serving(self, demand: Demand) -> tuple[Node, ...]:
        """The nodes that serve such tasks, with room or not."""
        return self.group(demand).nodes

    def with_room(self, demand: Demand) -> tuple[Node, ...]:
        """Those of them that may hold one more task."""
        group = self.group(demand)
        if group.with_room is None:
            group.with_room = tuple(node for node in group.nodes if node.has_room)
        return group.with_room

    def room_changed(self, name: str) -> None:
        """A node may hold another task now, or no longer."""
        for group in self._groups.values():
            if name in group.names:
                group.with_room = None

    def changed(self) -> None:
        """A node came or went."""
        self._by_demand.clear()
        self._groups.clear()
        self._kinds.clear()
