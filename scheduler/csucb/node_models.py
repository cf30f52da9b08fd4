"""What was learned of each node from its heartbeats and receipts: step cost per arm, link, power, dispatch delay.

The engine's totals are read wherever an event brings them, and each interval between two readings is one sample of
the step-cost model, so that no step counts twice however many tasks shared it. An interval with a stall is dropped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from perllm.broker.messages import (
    ArmBelief,
    Claimed,
    Completed,
    Counters,
    Dispatched,
    Event,
    Heartbeat,
    NodeBelief,
    NodeInfo,
    NodeUp,
    Returned,
    StepCost,
    StepTotals,
    Submitted,
)
from perllm.scheduler.core.cluster import Cluster, Demand, Node, Task
from perllm.scheduler.csucb.bandwidth import Bandwidth
from perllm.scheduler.csucb.cluster_arrays import ArmEstimate, NodeEstimate
from perllm.scheduler.csucb.slot_price import SlotPrice
from perllm.scheduler.csucb.step_cost import Sample, StepCostModel, sample_between, stalled

#: Samples below which an arm is taken at its optimistic confidence bound, and from which on at the pessimistic one.
PROVEN_SAMPLES = 15.0
#: Weight in its mean of a new reading of the power, and of a new dispatch delay.
POWER_READING_WEIGHT, DISPATCH_DELAY_WEIGHT = 0.1, 0.1
#: Weight of one more task in the mean task's value, and in its prompt and output.
MEAN_VALUE_WEIGHT, MEAN_TOKENS_WEIGHT = 0.02, 0.05
#: Dispatch delay assumed before any was seen, s.
PRIOR_DISPATCH_DELAY = 0.005
#: Longest dispatch delay that is believed, s.
LONGEST_DISPATCH_DELAY = 1.0
#: Time over which a node's arrival rate is averaged, s.
ARRIVAL_WINDOW = 8.0
#: A task is urgent that has fewer mean stays than this to its deadline.
URGENT_STAYS = 10.0


@dataclass(slots=True)
class Arrivals:
    """Answers that come to a node, each with its part of its task's prompt: decayed counts of all and of urgent ones,
    and the mean of what they are."""

    recent: float = 0.0  # answers of the last `ARRIVAL_WINDOW` s, as of `at`
    urgent: float = 0.0  # those of them with little time
    at: float = 0.0  # s
    prompt_tokens: float = 128.0  # of the mean answer
    output_tokens: float = 64.0

    def arrived(self, now: float, n: int, *, urgent: bool) -> None:
        """A task of n answers was sent here."""
        keep = math.exp(-max(now - self.at, 0.0) / ARRIVAL_WINDOW)
        self.recent, self.urgent = self.recent * keep + n, self.urgent * keep + urgent * n
        self.at = max(now, self.at)

    def ended(self, prompt: int, tokens: int, n: int) -> None:
        """A task ended here, with so many tokens in its n answers."""
        self.prompt_tokens += MEAN_TOKENS_WEIGHT * (prompt / n - self.prompt_tokens)
        self.output_tokens += MEAN_TOKENS_WEIGHT * (max(tokens / n, 1) - self.output_tokens)

    def rates(self, now: float) -> tuple[float, float]:
        """Answers/s, and urgent ones/s."""
        keep = math.exp(-max(now - self.at, 0.0) / ARRIVAL_WINDOW) / ARRIVAL_WINDOW
        return self.recent * keep, self.urgent * keep


@dataclass(slots=True)
class NodeModel:
    """What was learned of one node."""

    boot: str
    step_costs: dict[str, StepCostModel]
    link: Bandwidth
    watts: float  # beyond idle, while it steps
    dispatch_delay: float = PRIOR_DISPATCH_DELAY
    read: Counters = field(default_factory=Counters)  # the last reading …
    read_at: float = 0.0  # … and when, s
    read_models: dict[str, StepTotals] = field(default_factory=dict)  # of each model, of an engine that serves several
    active_models: frozenset[str] = frozenset()  # that worked since then
    stall_since_read: bool = False
    longest_step: float = 0.0  # s, of the steps that were no stall
    stall_seen: float = -math.inf  # when the last one was noticed, s
    stalled: bool = False  # now
    arrivals: Arrivals = field(default_factory=Arrivals)
    slot_price: SlotPrice = field(default_factory=SlotPrice)

    @classmethod
    def registered(cls, info: NodeInfo, at: float) -> NodeModel:
        step_costs = {m.name: StepCostModel.calibrated(m.calibration, at) for m in info.models}
        return cls(info.boot, step_costs, Bandwidth.prior(info.bandwidth), info.power.active, read_at=at)

    def restarted(self, info: NodeInfo, at: float) -> None:
        """The node is up again: the machine is the same, the engine's totals begin anew."""
        for offer in info.models:
            if offer.name in self.step_costs:
                self.step_costs[offer.name].rebase(offer.calibration, at)
            else:
                self.step_costs[offer.name] = StepCostModel.calibrated(offer.calibration, at)
        self.boot, self.read, self.read_at, self.read_models = info.boot, Counters(), at, {}
        self.active_models, self.stall_since_read, self.longest_step, self.stalled = frozenset(), False, 0.0, False

    def delayed(self, seconds: float) -> None:
        """A task that had a slot here was claimed so long after its dispatch, or not even then."""
        delay = min(max(seconds, 0.0), LONGEST_DISPATCH_DELAY)
        self.dispatch_delay += DISPATCH_DELAY_WEIGHT * (delay - self.dispatch_delay)

    # --- readings

    def read_counters(self, now: Counters, at: float, node: Node, *, model: str | None = None) -> None:
        """Learn from a reading of the engine's totals. `model` worked since the last one, and those of tasks here."""
        if len(node.info.models) == 1:
            self.active_models = frozenset({node.info.models[0].name})
        elif not now.models:
            claimed = [t for t in node.in_flight.values() if t.claimed]
            self.active_models |= {o.name for t in claimed if (o := node.offer(t.demand))}
            if model is not None:
                self.active_models |= {model}
        if now.steps < self.read.steps or now.busy < self.read.busy:
            self._begin_interval(now, at)  # the engine was started again
            self.read_models = dict(now.models)
            return
        self.watch_for_stall(now, at)
        sample = sample_between(self.read, now)
        if sample is None:
            return
        if self.stall_since_read:
            self.read_models = dict(now.models)
        else:
            self._learn_step_costs(sample, now, at)
        self._learn_power(now, at, node.info)
        self._begin_interval(now, at)

    def _learn_step_costs(self, sample: Sample, now: Counters, at: float) -> None:
        """Each model that worked learns from what it did; where the engine does not tell them apart, one that worked
        alone."""
        if not now.models:
            if len(self.active_models) == 1:
                self._learn_step_cost(next(iter(self.active_models)), sample, at)
            return
        for name, totals in now.models.items():
            part = sample_between(self.read_models.get(name, StepTotals()), totals)
            if part is not None:  # else there is too little yet
                self.read_models[name] = totals
                self._learn_step_cost(name, part, at)

    def _learn_step_cost(self, model: str, sample: Sample, at: float) -> None:
        step_cost = self.step_costs.get(model)
        if step_cost is not None:
            step_cost.learn(sample, at)

    def _begin_interval(self, now: Counters, at: float) -> None:
        """The next interval begins with this reading."""
        self.read, self.read_at = now, at
        self.active_models, self.stall_since_read = frozenset(), False

    def watch_for_stall(self, now: Counters, at: float) -> None:
        """Note whether the engine stands still, or a step since the last reading was too long to be one."""
        longest = self.longest_step or now.longest_step
        self.stalled = stalled(now, longest)
        jumped = now.longest_step > 3 * longest + 0.2
        if self.stalled or (jumped and now.longest_step > self.read.longest_step):
            self.stall_since_read, self.stall_seen = True, at
        # What seems a stall may be how long its steps are now: adapt slowly.
        self.longest_step = min(max(now.longest_step, 0.98 * longest), 1.1 * longest) if longest else now.longest_step

    def stall_reported(self, claimed: float, at: float) -> None:
        """A receipt says that a stall overlapped its attempt: news only if none was seen since the attempt began."""
        if self.stall_seen < claimed:
            self.stall_since_read, self.stall_seen = True, at

    def _learn_power(self, now: Counters, at: float, info: NodeInfo) -> None:
        busy, joules = now.busy - self.read.busy, now.energy - self.read.energy
        if joules > 0 and info.power.active > 0:
            watts = (joules - info.power.idle * (at - self.read_at)) / busy
            watts = min(max(watts, 0.2 * info.power.active), 5 * info.power.active)
            self.watts += POWER_READING_WEIGHT * (watts - self.watts)

    def throughput(self, info: NodeInfo) -> float:
        """Tasks/s it finishes with as many as fit its slots and its KV cache; 0 while nobody knows."""
        stay, answer = self.slot_price.stay, self.arrivals.prompt_tokens + self.arrivals.output_tokens
        held = min(float(info.slots), sum(offer.kv_tokens for offer in info.models) / answer)
        return max(held, 1.0) / stay if stay > 0 else 0.0

    # --- kept over a restart

    def snapshot(self) -> dict[str, Any]:
        return {
            "boot": self.boot,
            "step_costs": {model: step_cost.snapshot() for model, step_cost in self.step_costs.items()},
            "link": self.link.snapshot(),
            "watts": self.watts,
            "dispatch_delay": self.dispatch_delay,
            "read": self.read.model_dump(),
            "read_models": {name: totals.model_dump() for name, totals in self.read_models.items()},
            "read_at": self.read_at,
            "active_models": sorted(self.active_models),
            "stall_since_read": self.stall_since_read,
            "longest_step": self.longest_step,
            "stall_seen": None if math.isinf(self.stall_seen) else self.stall_seen,
            "stalled": self.stalled,
            "arrivals": asdict(self.arrivals),
            "slot_price": self.slot_price.snapshot(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> NodeModel:
        seen = state["stall_seen"]
        return cls(
            boot=state["boot"],
            step_costs={model: StepCostModel.restored(s) for model, s in state["step_costs"].items()},
            link=Bandwidth.restored(state["link"]),
            watts=state["watts"],
            dispatch_delay=state["dispatch_delay"],
            read=Counters(**state["read"]),
            read_models={name: StepTotals(**totals) for name, totals in state["read_models"].items()},
            read_at=state["read_at"],
            active_models=frozenset(state["active_models"]),
            stall_since_read=state["stall_since_read"],
            longest_step=state["longest_step"],
            stall_seen=-math.inf if seen is None else seen,
            stalled=state["stalled"],
            arrivals=Arrivals(**state["arrivals"]),
            slot_price=SlotPrice(**state["slot_price"]),
        )


class NodeModels:
    """All nodes by name. Without `learning`, the registrations are believed for ever; without `optimism`, new arms are
    taken at their pessimistic bound; without `foresight`, no arrivals are expected; without `price`, slots cost
    nothing. `value_weight` is the policy's V."""

    def __init__(
        self,
        value_weight: float,
        *,
        learning: bool = True,
        optimism: bool = True,
        foresight: bool = True,
        price: bool = True,
    ) -> None:
        self._learning, self._optimism, self._foresight, self._price = learning, optimism, foresight, price
        self._value_weight = value_weight
        self._nodes: dict[str, NodeModel] = {}
        self._mean_value = 1.0  # of a task

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
            self._mean_value += MEAN_VALUE_WEIGHT * (event.value - self._mean_value)
            return
        node = None if event.node is None else cluster.nodes.get(event.node)
        if node is None:
            return
        known = self.of(node)
        self._watch_slots(known, node, event.at)
        match event:
            case Heartbeat() if node.info.boot == event.boot:
                if self._learning:
                    known.read_counters(event.counters, event.at, node)
                else:
                    known.watch_for_stall(event.counters, event.at)
            case Dispatched() if task is not None:
                urgent_within = URGENT_STAYS * known.slot_price.stay
                urgent = urgent_within <= 0 or task.deadline - event.at < urgent_within
                known.arrivals.arrived(event.at, task.n, urgent=urgent)
            case Claimed() if task is not None and task.node == event.node:
                self._claimed(event, task, node, known)
            case Returned() if task is not None and task.node == event.node and task.claimed is None:
                self._not_claimed(event, task, known)
            case Completed() if task is not None and task.node == event.node:
                self._completed(event, task, node, known)

    def _watch_slots(self, known: NodeModel, node: Node, now: float) -> None:
        urgent = known.arrivals.rates(now)[1] * known.slot_price.stay / node.info.slots
        known.slot_price.watch(now, node.taken / node.info.slots, urgent)

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
            known.delayed(event.at - task.dispatched)

    def _not_claimed(self, event: Returned, task: Task, known: NodeModel) -> None:
        """It was to be claimed later than that, if ever."""
        if event.cause == "lease_expired" and task.dispatched is not None:
            known.delayed(event.at - task.dispatched)

    def _completed(self, event: Completed, task: Task, node: Node, known: NodeModel) -> None:
        receipt = event.receipt
        known.arrivals.ended(task.prompt_tokens, receipt.completion_tokens, task.n)
        if task.claimed is not None:
            known.slot_price.stayed(event.at - task.claimed)
        if not self._learning:
            return
        if receipt.prompt_tokens > 0:  # else the transfer was cut
            known.link.learn(receipt.payload_bytes, receipt.transfer)
        if receipt.stalled:
            known.stall_reported(task.claimed or event.at, event.at)
        known.read_counters(receipt.after, event.at, node, model=receipt.model)

    def estimate(self, node: Node) -> NodeEstimate:
        """A node as the forecast takes it: its step costs at the confidence bound that fits what is known of them."""
        known = self.of(node)
        now = max(node.changed, node.heard)
        rate = known.arrivals.rates(now)[0] if self._foresight else 0.0
        taken = node.taken / node.info.slots
        price = known.slot_price.per_second(self._value_weight * self._mean_value, taken) if self._price else 0.0
        return NodeEstimate(
            arms=tuple(self._arm(known.step_costs[o.name], now) for o in node.info.models),
            watts=known.watts,
            bandwidth=known.link.rate,
            latency=known.link.latency,
            dispatch_delay=known.dispatch_delay,
            stalled=known.stalled,
            arrival_rate=rate,
            arrival_prompt=known.arrivals.prompt_tokens,
            arrival_output=known.arrivals.output_tokens,
            slot_price=price,
            stay=known.slot_price.stay,
            throughput=known.throughput(node.info),
        )

    def belief(self, node: Node, now: float) -> NodeBelief:
        """What is known of a node, for people."""
        known, estimate = self.of(node), self.estimate(node)
        models = {}
        for offer in node.info.models:
            (step, sequence, prefill, context), spread, samples = known.step_costs[offer.name].at_time(now)
            cost = StepCost(step=step, sequence=sequence, prefill=prefill, context=context)
            models[offer.name] = ArmBelief(cost=cost, spread=spread, samples=samples)
        return NodeBelief(
            bandwidth=estimate.bandwidth,
            latency=estimate.latency,
            dispatch_delay=estimate.dispatch_delay,
            slot_price=estimate.slot_price,
            watts=max(estimate.watts, 0.0),
            models=models,
        )

    def _arm(self, step_cost: StepCostModel, now: float) -> ArmEstimate:
        theta, spread, count = step_cost.at_time(now)
        if not self._learning:
            return ArmEstimate(*theta, spread)
        optimistic = self._optimism and count < PROVEN_SAMPLES
        factor = math.exp(-spread if optimistic else spread)
        return ArmEstimate(theta[0] * factor, theta[1] * factor, theta[2] * factor, theta[3] * factor, spread)

    def proven(self, node: Node, demand: Demand, now: float) -> bool:
        """Whether enough was seen of the model that serves this on a node to believe that it is too slow."""
        offer = node.offer(demand)
        return offer is not None and self.of(node).step_costs[offer.name].at_time(now)[2] >= PROVEN_SAMPLES

    def snapshot(self) -> dict[str, Any]:
        nodes = {name: known.snapshot() for name, known in self._nodes.items()}
        return {"mean_value": self._mean_value, "nodes": nodes}

    def restore(self, state: dict[str, Any]) -> None:
        nodes = {name: NodeModel.restored(known) for name, known in state["nodes"].items()}
        self._mean_value, self._nodes = float(state["mean_value"]), nodes
