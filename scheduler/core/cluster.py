"""What the scheduler knows of the cluster: nodes and the tasks on them. Plain state, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp

from perllm.broker.messages import Counters, NodeInfo
from perllm.broker.text_features import Sketch

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
    max_tokens: int  # 0: it generates nothing, its inputs are embedded or ranked
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

    @property
    def generates(self) -> bool:
        return self.max_tokens > 0

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
    version: int = 0
    changed: float = 0.0
    completion_rate: float = 0.0  # tasks/s it finished lately, as of `completed_at`
    completed_at: float = 0.0  # when it last finished one, s
    has_room: bool = True  # for one more task, in its slots or its queue

    @property
    def name(self) -> str:
        return self.info.name

    def completed(self, at: float) -> None:
        """Note that it finished a task: the completion rate fades with COMPLETION_WINDOW."""
        fade = exp(-max(0.0, at - self.completed_at) / COMPLETION_WINDOW)
        self.completion_rate = self.completion_rate * fade + 1 / COMPLETION_WINDOW
        self.completed_at = at

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
