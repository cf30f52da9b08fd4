"""What the scheduler knows of the world: nodes and the tasks on them. Plain state, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp

from perllm.broker.messages import Counters, NodeInfo

#: Seconds over which a node's pace is taken.
PACE_WINDOW = 1.0


@dataclass(slots=True)
class Task:
    """One unfinished task. Times are the server's clock, s."""

    id: str
    submitted: float
    deadline: float
    value: float
    service: str
    model: str | None
    prompt_tokens: int
    payload_bytes: int
    max_tokens: int
    tenant: str = "default"
    expected_tokens: int | None = None
    strikes: int = 0
    attempt: int = 0
    # Set while it is placed
    node: str | None = None
    dispatched: float | None = None
    claimed: float | None = None
    generated: int = 0  # tokens, as of the node's last heartbeat
    avoid: Mapping[str, float] = field(default_factory=dict)  # nodes that lost it, until when they are avoided (s)

    def avoids(self, node: str, now: float) -> bool:
        """Whether it had better not go to this node now."""
        return self.avoid.get(node, 0.0) > now


@dataclass(slots=True)
class Node:
    """One registered node and the tasks it holds.

    `version` grows with every change to the node or its tasks, so that what a policy works out of them can be kept as
    long as it holds; `changed` is when that was (s).
    """

    info: NodeInfo
    since: float  # s, when it registered
    counters: Counters = field(default_factory=Counters)
    heard: float = 0.0  # s, server clock of the last heartbeat
    in_flight: dict[str, Task] = field(default_factory=dict)  # dispatched or running here, oldest first
    version: int = 0
    changed: float = 0.0
    pace: float = 0.0  # tasks/s it finished lately
    finished: float = 0.0  # s, when it last finished one
    has_room: bool = True  # for one more task, in its slots or its queue

    @property
    def name(self) -> str:
        return self.info.name

    def finish(self, at: float) -> None:
        """Note that it finished a task: its pace is the rate over an exponential window of PACE_WINDOW."""
        self.pace = self.pace * exp(-max(0.0, at - self.finished) / PACE_WINDOW) + 1 / PACE_WINDOW
        self.finished = at

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
