"""Upper references: policies that are told the simulator's truth, as no live scheduler can be.

Both are greedy: they place a task where it adds the most to V·(on-time value on that node) − energy/E₀, found by
rolling the node's future out with and without it, and refuse it when that is not above 0. `clairvoyant` knows every
task's output length; `informed` only the distribution its length was drawn from, and averages over samples of it. Both
know each node's true step times, its true present speed and its link's present bandwidth, but not future noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from perllm.broker.messages import Event
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Reject
from perllm.scheduler.csucb.token_bins import Floats
from perllm.scheduler.simulator.node import InSlot, SimulatedNode
from perllm.scheduler.simulator.rollout import (
    ATTEMPT,
    DECODE,
    NODE_STATE,
    PREFILL,
    Attempts,
    RolloutNode,
    rollout,
)
from perllm.scheduler.simulator.workload import Arrival

#: V: what a unit of on-time value is worth, in units of E₀.
VALUE_WEIGHT = 6.0
#: E₀, J.
ENERGY_SCALE = 100.0
#: Steps are rolled out this much slower than they are: a margin for the noise nobody can foresee.
STEP_TIME_MARGIN = 1.1
#: Output lengths `informed` draws per task.
SAMPLES = 16


class GroundTruth(Protocol):
    """What an oracle is told of the simulation it lives in."""

    seed: int

    @property
    def nodes(self) -> Mapping[str, SimulatedNode]: ...
    def arrival(self, task_id: str) -> Arrival:
        """The truth about a task."""

    def true_lengths(self) -> dict[str, Floats]:
        """Per service class, output lengths (tokens) of the distribution its tasks are drawn from."""


class Oracle(Baseline):
    """Greedy on the nodes' rolled-out futures. Subclasses give the output lengths."""

    def __init__(self, truth: GroundTruth) -> None:
        super().__init__(truth.seed)
        self._truth = truth
        self._nodes = {name: _rollout_node(node) for name, node in truth.nodes.items()}

    def lengths(self, task_id: str, generated: int) -> Floats:
        """Output lengths to roll out, tokens: each above `generated`."""
        raise NotImplementedError

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        best, best_gain = None, 0.0
        for node in candidates:
            gain = self._gain(task, node, now)
            if gain > best_gain:
                best, best_gain = node, gain
        return Reject("no node can finish it in time at a price worth paying") if best is None else Place(best.name)

    def _gain(self, task: Task, node: Node, now: float) -> float:
        """V·Δ(on-time value) − Δenergy/E₀ of putting `task` on `node`."""
        held = len(node.in_flight)
        attempts, state = self.attempts(node, task, now), self.node_now(node, now)
        value_with, joules_with = rollout(held + 1, attempts, state)
        value_without, joules_without = rollout(held, attempts, state)
        return VALUE_WEIGHT * (value_with - value_without) - (joules_with - joules_without) / ENERGY_SCALE

    def node_now(self, node: Node, now: float) -> RolloutNode:
        """`node` at its true present speed."""
        frozen, factor = self._truth.nodes[node.name].step_time_factor.without_noise(now)
        known = self._nodes[node.name]
        known.state["frozen"], known.state["factor"] = frozen, factor * STEP_TIME_MARGIN
        return known

    def attempts(self, node: Node, new: Task | None, now: float) -> Attempts:
        """What `node` holds and, last, the `new` task."""
        simulated = self._truth.nodes[node.name]
        in_slots = simulated.in_slots()
        seconds_per_byte = simulated.seconds_per_byte.at(now)[0]
        tasks = sorted(node.in_flight.values(), key=lambda task: task.id not in in_slots)
        with_slot = sum(task.id in in_slots for task in tasks)
        if new is not None:
            tasks.append(new)
        rows, output_left = np.zeros(len(tasks), ATTEMPT), []
        for i, task in enumerate(tasks):
            event = self._truth.arrival(task.id).event
            queued = InSlot(event.payload_bytes * seconds_per_byte, event.prompt_tokens, 0)
            at = in_slots.get(task.id, queued)
            held = event.prompt_tokens + at.generated
            rows[i] = at.transfer, at.prompt_left, held, event.deadline - now, event.value, 0, 0.0, 0.0, 0.0
            output_left.append(self.lengths(task.id, at.generated) - at.generated)
        return Attempts(with_slot, rows, np.ascontiguousarray(np.array(output_left).T))

    @override
    def snapshot(self) -> dict[str, Any]:
        raise NotImplementedError("an oracle lives in one simulation")


def _rollout_node(node: SimulatedNode) -> RolloutNode:
    """The node at its table's speed."""
    table = node.table
    state = np.zeros(1, NODE_STATE)
    state["slots"], state["chunk"], state["factor"] = node.spec.slots, node.spec.chunk, 1.0
    state["prefill_watts"] = table.prefill_watts - table.idle_watts
    decode = np.zeros(len(table.base), DECODE)
    decode["base"], decode["slope"], decode["watts"] = table.base, table.slope, table.watts
    decode["watts"] -= table.idle_watts
    prefill = np.zeros(len(table.prefill_tokens), PREFILL)
    prefill["tokens"], prefill["seconds"] = table.prefill_tokens, table.prefill_seconds
    return RolloutNode(state, decode, prefill)


class Clairvoyant(Oracle):
    """Greedy on true futures, every task's output length known: an upper reference, in simulations only."""

    name = "clairvoyant"

    @override
    def lengths(self, task_id: str, generated: int) -> Floats:
        arrival = self._truth.arrival(task_id)
        return np.array([max(generated + 1, min(arrival.output, arrival.event.max_tokens))], dtype=float)


class Informed(Oracle):
    """Greedy on futures sampled from the true output-length distributions: an upper reference, in simulations only."""

    name = "informed"

    def __init__(self, truth: GroundTruth) -> None:
        super().__init__(truth)
        self._sorted = {name: np.sort(lengths) for name, lengths in truth.true_lengths().items()}
        self._uniform: dict[str, Floats] = {}

    @override
    def lengths(self, task_id: str, generated: int) -> Floats:
        known = self._sorted[self._truth.arrival(task_id).event.service]
        # The same quantiles for a task every time, so that two rollouts differ by what happened, not by chance.
        uniform = self._uniform.get(task_id)
        if uniform is None:
            uniform = (self.rng.permutation(SAMPLES) + self.rng.random()) / SAMPLES
            self._uniform[task_id] = uniform
        begin = int(np.searchsorted(known, generated, side="right"))
        if begin == len(known):
            return np.full(SAMPLES, generated + 1.0)
        chosen: Floats = known[begin + (uniform * (len(known) - begin)).astype(int)]
        return chosen

    @override
    def observe(self, event: Event, task: Task | None, cluster: Cluster) -> None:
        if event.type in ("completed", "ended"):
            self._uniform.pop(event.id, None)


ORACLES: dict[str, type[Oracle]] = {"clairvoyant": Clairvoyant, "informed": Informed}
