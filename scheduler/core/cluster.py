"""What the scheduler knows of the cluster: nodes and the tasks on them. Plain state, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp

from perllm.broker.messages import Counters, NodeInfo
from perllm.broker.text_features import Sketch
from perllm.scheduler.core.pace import Pace

#: Time constant of a node's completion rate, s.
COMPLETION_WINDOW = 1.0


@dataclass(slots=True)
class Task:
    """One unfinished task, as submitted, and where it is. Times are the ledger server's clock, s."""

    id: str
    submitted: float
    deadline: float
    value: float  # of being on time
    service: str  # class of service
    model: str | None  # None: any
    prompt_tokens: int  # estimated
    payload_bytes: int
    max_tokens: int
    tenant: str = "default"
    expected_tokens: int | None = None  # the producer's hint
    text: Sketch = b""
    strikes: int = 0
    attempt: int = 0  # of the last one
    # Set while it is placed
    node: str | None = None
    dispatched: float | None = None
    claimed: float | None = None
    generated: int = 0  # tokens, as of the node's last heartbeat
    avoid: Mapping[str, float] = field(default_factory=dict)  # nodes that lost it, until when they are avoided (s)

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
    unclaimed: dict[str, Task] = field(default_factory=dict)  # those of them it has not taken up
    free_since: float = 0.0  # when it last had a slot again, s
    last_claim: tuple[float, float] = (0.0, 0.0)  # when it last claimed, and when that was dispatched, s
    pace: Pace = field(default_factory=Pace)
    version: int = 0
    changed: float = 0.0
    completion_rate: float = 0.0  # tasks/s it finished lately, as of `completed_at`
    completed_at: float = 0.0  # when it last finished one, s
    has_room: bool = True  # for one more task, in its slots or its queue

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def running(self) -> int:
        """Tasks it has taken up."""
        return len(self.in_flight) - len(self.unclaimed)

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

    def left(self, task: Task, at: float) -> None:
        """Note that a task is here no more."""
        if self.in_flight.pop(task.id, None) is None:
            return
        if self.unclaimed.pop(task.id, None) is None and self.running == self.info.slots - 1:
            self.free_since = max(self.free_since, at)

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


@dataclass(slots=True)
class Cluster:
    """All live nodes by name. Iteration order is registration order, so decisions are reproducible."""

    nodes: dict[str, Node] = field(default_factory=dict)
    serving: dict[str | None, tuple[Node, ...]] = field(default_factory=lambda: {None: ()})  # by model; None: any model
    waiting: int = 0  # pending tasks when the round began
