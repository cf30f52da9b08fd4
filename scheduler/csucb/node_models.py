"""What was learned of each node from its heartbeats and receipts: speed per model, link, power, dispatch delay.

The engine's totals are read wherever an event brings them, and each stretch between two readings is one sample of the
speed model, so that no step counts twice however many tasks shared it. A stretch that overlaps a stall is dropped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from perllm.broker.messages import (
    Claimed,
    Completed,
    Counters,
    Dispatched,
    Event,
    Heartbeat,
    NodeInfo,
    NodeUp,
    Submitted,
)
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.csucb.bandwidth import Bandwidth
from perllm.scheduler.csucb.cluster_arrays import Learned
from perllm.scheduler.csucb.slot_price import SlotPrice
from perllm.scheduler.csucb.step_cost import StepCostModel, sample_between, stalled

#: Samples until which a node is seen with optimism, and from which on with caution.
PROVEN = 15.0
#: Weight of a new reading of the power and of the dispatch delay.
WEIGHT = 0.1
#: Dispatch delay assumed before any was seen, s.
FIRST_HOP = 0.005
#: Time over which a node's inflow is averaged, s.
INFLOW_MEMORY = 8.0
#: A task is patient while it has more than this many mean stays to its deadline.
PATIENCE = 10.0


@dataclass(slots=True)
class Inflow:
    """Tasks that come to a node: decayed counts of all and of urgent ones, and the mean of what they are."""

    recent: float = 0.0  # tasks of the last `INFLOW_MEMORY` s, as of `at`
    urgent: float = 0.0
    at: float = 0.0  # s
    prompt: float = 128.0  # tokens
    tokens: float = 64.0

    def came(self, now: float, *, urgent: bool) -> None:
        keep = math.exp(-max(now - self.at, 0.0) / INFLOW_MEMORY)
        self.recent, self.urgent = self.recent * keep + 1.0, self.urgent * keep + urgent
        self.at = max(now, self.at)

    def ended(self, prompt: int, tokens: int) -> None:
        self.prompt += 0.05 * (prompt - self.prompt)
        self.tokens += 0.05 * (max(tokens, 1) - self.tokens)

    def rates(self, now: float) -> tuple[float, float]:
        """Tasks/s, and urgent tasks/s."""
        keep = math.exp(-max(now - self.at, 0.0) / INFLOW_MEMORY) / INFLOW_MEMORY
        return self.recent * keep, self.urgent * keep


@dataclass(slots=True)
class NodeModel:
    """One node."""

    boot: str
    speeds: dict[str, StepCostModel]
    link: Bandwidth
    watts: float  # beyond idle, while it steps
    dispatch_delay: float = FIRST_HOP
    read: Counters = field(default_factory=Counters)  # the last reading …
    read_at: float = 0.0  # … and when, s
    models: frozenset[str] = frozenset()  # that worked since then
    spoiled: bool = False  # a stall fell into the stretch since then
    longest: float = 0.0  # s, of the steps that were no stall
    stall_seen: float = -math.inf  # s
    still: bool = False
    inflow: Inflow = field(default_factory=Inflow)
    toll: SlotPrice = field(default_factory=SlotPrice)

    @classmethod
    def registered(cls, info: NodeInfo, at: float) -> NodeModel:
        speeds = {m.name: StepCostModel.calibrated(m.calibration, at) for m in info.models}
        return cls(info.boot, speeds, Bandwidth.prior(info.bandwidth), info.power.active, read_at=at)

    def restarted(self, info: NodeInfo, at: float) -> None:
        """The node is up again: the machine is the same, the engine's totals begin anew."""
        for offer in info.models:
            if offer.name in self.speeds:
                self.speeds[offer.name].rebase(offer.calibration, at)
            else:
                self.speeds[offer.name] = StepCostModel.calibrated(offer.calibration, at)
        self.boot, self.read, self.read_at = info.boot, Counters(), at
        self.models, self.spoiled, self.longest, self.still = frozenset(), False, 0.0, False

    # --- readings

    def look(self, now: Counters, at: float, node: Node, *, model: str | None = None) -> None:
        """Take a reading of the totals; `model` worked since the last one, and whatever is on the node."""
        if len(node.info.models) == 1:
            self.models = frozenset({node.info.models[0].name})
        else:
            self.models |= {o.name for t in node.in_flight.values() if t.claimed and (o := node.info.offer(t.model))}
            if model is not None:
                self.models |= {model}
        if now.steps < self.read.steps or now.busy < self.read.busy:
            self._begin(now, at)  # totals of another life
            return
        self.watch_for_stall(now, at)
        sample = sample_between(self.read, now)
        if sample is None:
            return
        if not self.spoiled and len(self.models) == 1:
            speed = self.speeds.get(next(iter(self.models)))
            if speed is not None:
                speed.learn(sample, at)
        self._learn_power(now, at, node.info)
        self._begin(now, at)

    def _begin(self, now: Counters, at: float) -> None:
        """A new stretch begins here."""
        self.read, self.read_at = now, at
        self.models, self.spoiled = frozenset(), False

    def watch_for_stall(self, now: Counters, at: float) -> None:
        longest = self.longest or now.longest_step
        self.still = stalled(now, longest)
        jumped = now.longest_step > 3 * longest + 0.2
        if self.still or (jumped and now.longest_step > self.read.longest_step):
            self.spoiled, self.stall_seen = True, at
        # What looked like a stall may be how it steps now: believe it by and by.
        self.longest = min(max(now.longest_step, 0.98 * longest), 1.1 * longest) if longest else now.longest_step

    def stall_reported(self, claimed: float, at: float) -> None:
        """A receipt says that a stall overlapped its attempt: news only if none was seen since the attempt began."""
        if self.stall_seen < claimed:
            self.spoiled, self.stall_seen = True, at

    def _learn_power(self, now: Counters, at: float, info: NodeInfo) -> None:
        busy, joules = now.busy - self.read.busy, now.energy - self.read.energy
        if joules > 0 and info.power.active > 0:
            watts = (joules - info.power.idle * (at - self.read_at)) / busy
            watts = min(max(watts, 0.2 * info.power.active), 5 * info.power.active)
            self.watts += WEIGHT * (watts - self.watts)

    # --- kept over a restart

    def snapshot(self) -> dict[str, Any]:
        return {
            "boot": self.boot,
            "speeds": {model: speed.snapshot() for model, speed in self.speeds.items()},
            "link": self.link.snapshot(),
            "watts": self.watts,
            "dispatch_delay": self.dispatch_delay,
            "read": self.read.model_dump(),
            "read_at": self.read_at,
            "models": sorted(self.models),
            "spoiled": self.spoiled,
            "longest": self.longest,
            "stall_seen": None if math.isinf(self.stall_seen) else self.stall_seen,
            "still": self.still,
            "inflow": asdict(self.inflow),
            "toll": self.toll.snapshot(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> NodeModel:
        seen = state["stall_seen"]
        return cls(
            boot=state["boot"],
            speeds={model: StepCostModel.restored(s) for model, s in state["speeds"].items()},
            link=Bandwidth(**state["link"]),
            watts=state["watts"],
            dispatch_delay=state["dispatch_delay"],
            read=Counters(**state["read"]),
            read_at=state["read_at"],
            models=frozenset(state["models"]),
            spoiled=state["spoiled"],
            longest=state["longest"],
            stall_seen=-math.inf if seen is None else seen,
            still=state["still"],
            inflow=Inflow(**state["inflow"]),
            toll=SlotPrice(**state["toll"]),
        )


class NodeModels:
    """All nodes by name. With `learning` off, the registrations are believed for ever; without `foresight`, nobody is
    expected to come; without `price`, slots cost nothing. `weight` is the policy's V."""

    def __init__(
        self,
        weight: float,
        *,
        learning: bool = True,
        optimism: bool = True,
        foresight: bool = True,
        price: bool = True,
    ) -> None:
        self._learning, self._optimism, self._foresight, self._price = learning, optimism, foresight, price
        self._weight = weight
        self._nodes: dict[str, NodeModel] = {}
        self._value = 1.0  # of the mean task

    def of(self, node: Node) -> NodeModel:
        """What is known of a node."""
        known = self._nodes.get(node.name)
        if known is None:
            known = self._nodes[node.name] = NodeModel.registered(node.info, node.since)
        return known

    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        """Learn from an event, before the cluster changes by it."""
        if isinstance(event, NodeUp):
            self._node_up(event)
            return
        if isinstance(event, Submitted):
            self._value += 0.02 * (event.value - self._value)
            return
        node = None if event.node is None else cluster.nodes.get(event.node)
        if node is None:
            return
        known = self.of(node)
        self._watch_slots(known, node, event.at)
        match event:
            case Heartbeat() if node.info.boot == event.boot:
                if self._learning:
                    known.look(event.counters, event.at, node)
                else:
                    known.watch_for_stall(event.counters, event.at)
            case Dispatched() if task is not None:
                patience = PATIENCE * known.toll.stay
                known.inflow.came(event.at, urgent=patience <= 0 or task.deadline - event.at < patience)
            case Claimed() if task is not None and task.node == event.node:
                self._claimed(event, task, node, known)
            case Completed() if task is not None and task.node == event.node:
                self._completed(event, task, node, known)

    def _watch_slots(self, known: NodeModel, node: Node, now: float) -> None:
        urgent = known.inflow.rates(now)[1] * known.toll.stay / node.info.slots
        known.toll.watch(now, len(node.in_flight) / node.info.slots, urgent)

    def _node_up(self, event: NodeUp) -> None:
        info = event.info
        known = self._nodes.get(info.name)
        if known is None:
            self._nodes[info.name] = NodeModel.registered(info, event.at)
        elif known.boot != info.boot:
            known.restarted(info, event.at)

    def _claimed(self, event: Claimed, task: Task, node: Node, known: NodeModel) -> None:
        claimed = sum(1 for t in node.in_flight.values() if t.claimed)
        if task.dispatched is not None and len(node.in_flight) <= node.info.slots and claimed < node.info.slots:
            # It did not wait for a slot
            known.dispatch_delay += WEIGHT * (min(max(event.at - task.dispatched, 0.0), 1.0) - known.dispatch_delay)

    def _completed(self, event: Completed, task: Task, node: Node, known: NodeModel) -> None:
        receipt = event.receipt
        known.inflow.ended(task.prompt_tokens, receipt.completion_tokens)
        if task.claimed is not None:
            known.toll.stayed(event.at - task.claimed)
        if not self._learning:
            return
        if receipt.prompt_tokens > 0:  # else the transfer was cut
            known.link.learn(receipt.payload_bytes, receipt.transfer)
        if receipt.stalled:
            known.stall_reported(task.claimed or event.at, event.at)
        known.look(receipt.after, event.at, node, model=receipt.model)

    def learned(self, node: Node) -> Learned:
        """A node as the forecast sees it, its speed at the confidence bound that fits what is known of it."""
        known = self.of(node)
        now = max(node.changed, node.heard)
        rate = known.inflow.rates(now)[0] if self._foresight else 0.0
        taken = len(node.in_flight) / node.info.slots
        return Learned(
            steps=tuple(self._steps(known.speeds[o.name], now) for o in node.info.models),
            watts=known.watts,
            rate=known.link.rate,
            latency=known.link.latency,
            dispatch_delay=known.dispatch_delay,
            still=known.still,
            inflow=(rate, known.inflow.prompt, known.inflow.tokens),
            toll=known.toll.per_second(self._weight * self._value, taken) if self._price else 0.0,
            pace=node.info.slots / known.toll.stay if known.toll.stay > 0 else 0.0,
        )

    def _steps(self, speed: StepCostModel, now: float) -> tuple[float, float, float, float, float]:
        theta, spread, count = speed.at_time(now)
        if not self._learning:
            return *theta, spread
        optimistic = self._optimism and count < PROVEN
        factor = math.exp(-spread if optimistic else spread)
        return theta[0] * factor, theta[1] * factor, theta[2] * factor, theta[3] * factor, spread

    def proven(self, node: Node, model: str | None, now: float) -> bool:
        """Whether enough was seen of a model on a node to believe that it is too slow."""
        offer = node.info.offer(model)
        return offer is not None and self.of(node).speeds[offer.name].at_time(now)[2] >= PROVEN

    def snapshot(self) -> dict[str, Any]:
        return {"value": self._value, "nodes": {name: known.snapshot() for name, known in self._nodes.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        nodes = {name: NodeModel.restored(known) for name, known in state["nodes"].items()}
        self._value, self._nodes = float(state["value"]), nodes
