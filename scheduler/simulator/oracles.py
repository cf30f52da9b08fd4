"""Upper references: policies that are told the simulator's truth, as no live scheduler can be.

Both are greedy: they place a task where it adds the most to V·(on-time value on that node) − energy/E0, found by
playing the node's future forward with and without it, and refuse it when that is not above 0. `clairvoyant` knows every
task's output length; `informed` only the distribution its length was drawn from, and averages over samples of it. Both
know each node's true step times, its true present speed and its link's present bandwidth, but not future noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numba
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from perllm.broker.messages import Event
from perllm.scheduler.baselines.base import Baseline
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Place, Reject
from perllm.scheduler.simulator.node import SimNode
from perllm.scheduler.simulator.workload import Arrival

#: What a unit of on-time value is worth, in units of E0.
V = 6.0
#: Energy scale, J.
E0 = 100.0
#: Steps are played this much slower than they are: a margin for the noise nobody can foresee.
MARGIN = 1.1
#: Output lengths `informed` draws per task.
SAMPLES = 16

Floats = NDArray[np.float64]


class Truth(Protocol):
    """What an oracle is told of the simulation it lives in."""

    seed: int

    @property
    def nodes(self) -> Mapping[str, SimNode]: ...
    def arrival(self, task_id: str) -> Arrival:
        """The truth about a task."""

    def true_lengths(self) -> dict[str, Floats]:
        """Per service class, output lengths (tokens) of the distribution its tasks are drawn from."""


class _Oracle(Baseline):
    """Greedy on the node's played-forward future."""

    def __init__(self, simulation: Truth) -> None:
        super().__init__(simulation.seed)
        self._sim = simulation
        self._tables = {
            name: (
                np.array(node.table.base),
                np.array(node.table.slope),
                np.array(node.table.watts) - node.table.idle_watts,
                np.array(node.table.prefill_tokens),
                np.array(node.table.prefill_seconds),
                node.table.prefill_watts - node.table.idle_watts,
            )
            for name, node in simulation.nodes.items()
        }

    def lengths(self, task_id: str, generated: int) -> Floats:
        """Output lengths to play, tokens: each above `generated`."""
        raise NotImplementedError

    @override
    def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
        best, gain = None, 0.0
        for node in candidates:
            score = self._gain(task, node, now)
            if score > gain:
                best, gain = node, score
        return Reject("no node can finish it in time at a price worth paying") if best is None else Place(best.name)

    def _gain(self, task: Task, node: Node, now: float) -> float:
        """V·Δ(on-time value) − Δenergy/E0 of putting `task` on `node`."""
        scene = self.scene(node, task, now)
        held = len(node.in_flight)
        value_with, joules_with = play(held + 1, *scene)
        value_without, joules_without = play(held, *scene)
        return V * (value_with - value_without) - (joules_with - joules_without) / E0

    def scene(self, node: Node, task: Task | None, now: float) -> tuple[Any, ...]:
        """`play`'s arguments but the first, for what `node` holds and, last, `task`."""
        sim = self._sim.nodes[node.name]
        inside = sim.inside()
        tasks = sorted(node.in_flight.values(), key=lambda flight: flight.id not in inside)
        holding = sum(flight.id in inside for flight in tasks)
        if task is not None:
            tasks.append(task)
        rows, lengths = np.zeros((len(tasks), 5)), []
        for i, flight in enumerate(tasks):
            event = self._sim.arrival(flight.id).event
            travel = event.payload_bytes * sim.link_pace.at(now)[0]
            ready, prefill, generated = inside.get(flight.id, (travel, event.prompt_tokens, 0))
            rows[i] = ready, prefill, event.prompt_tokens + generated, event.deadline - now, event.value
            lengths.append(self.lengths(flight.id, generated) - generated)
        left = np.ascontiguousarray(np.array(lengths).T)
        frozen, factor = sim.pace.trend(now)
        return (
            rows,
            left,
            holding,
            sim.spec.slots,
            sim.spec.chunk,
            frozen,
            factor * MARGIN,
            *self._tables[node.name],
        )

    @override
    def snapshot(self) -> dict[str, Any]:
        raise NotImplementedError("an oracle lives in one simulation")


class Clairvoyant(_Oracle):
    """Knows every task's true output length."""

    name = "clairvoyant"

    @override
    def lengths(self, task_id: str, generated: int) -> Floats:
        arrival = self._sim.arrival(task_id)
        return np.array([max(generated + 1, min(arrival.output, arrival.event.max_tokens))], dtype=float)


class Informed(_Oracle):
    """Knows the distribution each class's output lengths are drawn from."""

    name = "informed"

    def __init__(self, simulation: Truth) -> None:
        super().__init__(simulation)
        self._sorted = {name: np.sort(lengths) for name, lengths in simulation.true_lengths().items()}
        self._uniform: dict[str, Floats] = {}

    @override
    def lengths(self, task_id: str, generated: int) -> Floats:
        known = self._sorted[self._sim.arrival(task_id).event.service]
        # The same quantiles for a task every time, so that two looks differ by what happened, not by chance.
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


ORACLES: dict[str, type[_Oracle]] = {"clairvoyant": Clairvoyant, "informed": Informed}


@numba.njit(cache=True)
def play(  # noqa: PLR0915 (one loop over one machine's time; numba inlines no objects)
    count: int,
    rows: Floats,
    left: Floats,
    holding: int,
    slots: int,
    chunk: int,
    frozen: float,
    factor: float,
    base: Floats,
    slope: Floats,
    watts: Floats,
    prefill_tokens: Floats,
    prefill_seconds: Floats,
    prefill_watts: float,
) -> tuple[float, float]:
    """Play a node's future: the on-time value and the J (idle apart) of its first `count` jobs, means over samples.

    `rows`[job] is (s its payload yet needs of the link, prompt tokens yet to prefill, tokens held, s to its deadline,
    value), in queue order, of which the first `holding` have slots; `left`[sample, job] the tokens it has yet to
    generate. Payloads travel one after the other, those of queued jobs once they have a slot. Steps are frozen for
    `frozen` s and then take `factor` times the table's time; `watts` leave idle power out. A job stops at its deadline.
    A prefill is played as one stretch in which the others decode on.
    """
    queued, travelling, prefilling, decoding, over = 0, 1, 2, 3, 4
    value, joules = 0.0, 0.0
    state = np.empty(count, np.int64)
    todo, held, ready = np.empty(count), np.empty(count), np.empty(count)
    for sample in range(left.shape[0]):
        time, used, head, link_free = frozen, 0, min(holding, count), 0.0
        for j in range(count):
            todo[j], held[j] = left[sample, j], rows[j, 2]
            if j >= holding:
                state[j] = queued
                continue
            used += 1
            link_free += rows[j, 0]
            ready[j] = link_free if rows[j, 0] > 0 else 0.0
            state[j] = travelling if ready[j] > time else prefilling if rows[j, 1] > 0 else decoding
        while True:
            for j in range(count):  # who has run out of time gives up his slot
                if state[j] != over and rows[j, 3] <= time:
                    used -= 1 if state[j] != queued else 0
                    state[j] = over
            while head < count and used < slots:
                if state[head] == queued:
                    link_free = max(link_free, time) + rows[head, 0]
                    state[head], ready[head] = travelling, link_free
                    used += 1
                head += 1
            active, context, prompt_of, soonest, fewest = 0, 0.0, -1, math.inf, math.inf
            for j in range(count):
                if state[j] == travelling:
                    if ready[j] <= time:
                        state[j] = prefilling
                    else:
                        soonest = min(soonest, ready[j])
                if state[j] == prefilling and prompt_of < 0:
                    prompt_of = j
                if state[j] == decoding:
                    active, context, fewest = active + 1, context + held[j], min(fewest, todo[j])
                if state[j] != queued and state[j] != over:
                    soonest = min(soonest, rows[j, 3])
            steps = 0.0
            if prompt_of >= 0:
                prompt = rows[prompt_of, 1]
                steps = math.ceil(prompt / chunk)
                i = 1
                while i < len(prefill_tokens) - 1 and prefill_tokens[i] < prompt / steps:
                    i += 1
                rise = (prefill_seconds[i] - prefill_seconds[i - 1]) / (prefill_tokens[i] - prefill_tokens[i - 1])
                extra = prefill_seconds[i - 1] + rise * (prompt / steps - prefill_tokens[i - 1])
                decode = 0.0
                if active > 0:
                    decode = base[active] + slope[active] * context
                    extra -= prefill_seconds[0]
                joules += factor * steps * (decode * watts[active] + extra * prefill_watts)
                time += factor * steps * (decode + extra)
            elif active > 0:
                first = factor * (base[active] + slope[active] * context)
                growth = factor * slope[active] * active
                span = max(soonest - time, 0.0)
                steps = fewest
                if steps * first + growth * steps * (steps - 1) / 2 > span:
                    if growth > 0:
                        b = first - growth / 2
                        steps = math.ceil((math.sqrt(b * b + 2 * growth * span) - b) / growth)
                    else:
                        steps = math.ceil(span / first)
                    steps = min(max(steps, 1.0), fewest)
                taken = steps * first + growth * steps * (steps - 1) / 2
                joules += taken * watts[active]
                time += taken
            elif not math.isinf(soonest):
                time = soonest
            else:
                break
            for j in range(count):
                if state[j] == decoding:
                    todo[j] -= steps
                    held[j] += steps
                elif j == prompt_of:
                    state[j] = decoding
                    todo[j] -= 1
                    held[j] += 1
                if state[j] == decoding and todo[j] <= 0:
                    state[j] = over
                    used -= 1
                    if time <= rows[j, 3]:
                        value += rows[j, 4]
    return value / left.shape[0], joules / left.shape[0]
