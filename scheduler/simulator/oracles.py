"""Policies that are told the simulator's truth, as no live scheduler can be.

Both are greedy: they place a task where it adds the most to V·(on-time value on that node) − energy/E₀, found by
rolling the node's future out with and without it. `foresight` knows every task's output length; `informed` only the
distribution its length was drawn from, and averages over samples of it. Both know each node's true step times, its true
present speed and its link's present bandwidth, but not future noise.

E₀ is the scenario's own: what its mean task costs where it is cheapest. A task that nothing speaks for now waits while
some node could yet finish it in time, and is refused after that. With `patience`, one that would cost well more than
its least here and now waits for a fuller batch or a better node, for that share of the time it can.

Greedy is not best: an upper reference is what `clairvoyant` makes of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from perllm.broker.messages import Event
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Reject, Wait
from perllm.scheduler.csucb.token_bins import Floats
from perllm.scheduler.simulator.capacity import least_joules
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
from perllm.scheduler.simulator.scenario import Scenario
from perllm.scheduler.simulator.workload import Arrival

#: V: what a unit of on-time value is worth, in units of E₀.
VALUE_WEIGHT = 25.0
#: A patient task waits where it would cost more than this many times its least.
DEAR = 1.3
#: A task that waits is looked at again after this share of the time it can wait, and at least so many s.
REVIEW_SHARE, MIN_REVIEW = 0.1, 0.1
#: Steps are rolled out this much slower than they are: a margin for the noise nobody can foresee.
STEP_TIME_MARGIN = 1.1
#: When each task is dispatched, s, and to which node.
Plan = dict[str, tuple[float, str]]
#: Output lengths `informed` draws per task.
SAMPLES = 16


class GroundTruth(Protocol):
    """What an oracle is told of the simulation it lives in."""

    seed: int
    scenario: Scenario

    @property
    def nodes(self) -> Mapping[str, SimulatedNode]: ...
    def arrival(self, task_id: str) -> Arrival:
        """The truth about a task."""

    def true_lengths(self) -> dict[str, Floats]:
        """Per service class, output lengths (tokens) of the distribution its tasks are drawn from."""


class Oracle(Baseline):
    """Greedy on the nodes' rolled-out futures. Subclasses give the output lengths."""

    def __init__(self, truth: GroundTruth, *, value_weight: float = VALUE_WEIGHT, patience: float = 0.0) -> None:
        super().__init__(truth.seed)
        self._truth, self._patience = truth, patience
        self._joules_per_value = value_weight * least_joules(truth.scenario)
        self._nodes = {name: _rollout_node(node) for name, node in truth.nodes.items()}

    def lengths(self, task_id: str, generated: int) -> Floats:
        """Output lengths to roll out, tokens: each above `generated`."""
        raise NotImplementedError

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        best, best_gain, best_joules = None, 0.0, 0.0
        for node in candidates:
            value, joules = self._added(task, node, now)
            gain = self._joules_per_value * value - joules
            if gain > best_gain:
                best, best_gain, best_joules = node, gain, joules
        if best is not None and not self._patience:
            return Place(best.name)
        spare = max(self._spare(task, node, now) for node in cluster.serving(task.demand))
        if best is None and spare < 0:
            return Reject("no node could finish it in time, even with nothing else to do")
        until = now + max(MIN_REVIEW, REVIEW_SHARE * spare)
        if best is None:
            return Wait(until)
        waited = now - task.submitted
        dear = best_joules > DEAR * min(self._least(task, name) for name in self._truth.nodes)
        return Wait(until, rank=best_gain) if dear and waited < self._patience * (waited + spare) else Place(best.name)

    def _added(self, task: Task, node: Node, now: float) -> tuple[float, float]:
        """The on-time value and the J that `task` adds to `node`."""
        held = len(node.in_flight)
        attempts, state = self.attempts(node, task, now), self.node_now(node, now)
        value_with, joules_with = rollout(held + 1, attempts, state)
        value_without, joules_without = rollout(held, attempts, state)
        return value_with - value_without, joules_with - joules_without

    def _spare(self, task: Task, node: Node, now: float) -> float:
        """s by which `task` could start later on `node` and yet be in time, had that nothing else to do; by the
        shortest length it may have."""
        simulated, output = self._truth.nodes[node.name], float(self.lengths(task.id, 0).min())
        table, payload = simulated.table, self._truth.arrival(task.id).event.payload_bytes
        frozen, factor = simulated.step_time_factor.without_noise(now)
        steps = math.ceil(task.prompt_tokens / simulated.spec.chunk)
        busy = steps * table.prefill(task.prompt_tokens / steps)
        busy += (output - 1) * table.decode(1, task.prompt_tokens + output / 2)
        transfer = payload * simulated.seconds_per_byte.at(now)[0]
        return task.deadline - now - self._truth.scenario.dispatch_delay - transfer - frozen - factor * busy

    def _least(self, task: Task, name: str) -> float:
        """J it costs on a node whose slots are all taken."""
        node = self._truth.nodes[name]
        table, batch, output = node.table, node.spec.slots, float(self.lengths(task.id, 0).mean())
        step = table.base[batch] / batch + table.slope[batch] * (task.prompt_tokens + output / 2)
        prefill = table.prefill(task.prompt_tokens) - table.prefill_seconds[0]
        return prefill * (table.prefill_watts - table.idle_watts) + output * step * (
            table.watts[batch] - table.idle_watts
        )

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


class Foresight(Oracle):
    """Greedy on true futures, every task's output length known; in simulations only.

    Tasks in `plan` are placed as it says; with `only_plan`, all others are refused.
    """

    name = "foresight"

    def __init__(
        self, truth: GroundTruth, *, plan: Plan | None = None, only_plan: bool = False, **options: float
    ) -> None:
        super().__init__(truth, **options)
        self._plan, self._only_plan = plan or {}, only_plan

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        planned = self._plan.get(task.id)
        if planned is None:
            return Reject("not planned") if self._only_plan else super().choose(task, candidates, cluster, now)
        at, name = planned
        if now < at:
            return Wait(at)
        return Place(name) if any(n.name == name for n in candidates) else Wait(now + MIN_REVIEW, rank=math.inf)

    @override
    def lengths(self, task_id: str, generated: int) -> Floats:
        arrival = self._truth.arrival(task_id)
        return np.array([max(generated + 1, min(arrival.output, arrival.event.max_tokens))], dtype=float)


class Informed(Oracle):
    """Greedy on futures sampled from the true output-length distributions; in simulations only."""

    name = "informed"

    def __init__(self, truth: GroundTruth, **options: float) -> None:
        super().__init__(truth, **options)
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


ORACLES: dict[str, type[Oracle]] = {"foresight": Foresight, "informed": Informed}
