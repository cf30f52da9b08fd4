"""What no policy can exceed: an upper bound on on-time value and a lower bound on energy, proved and not trusted.

The bound is on one simulation: its arrivals, its true output lengths, its nodes' noise and faults as drawn. It holds
for every policy, one that sees the future included.

**Least demand.** An engine step lasts (`StepTable.mixed`) factor·(base[B] + slope[B]·K + m(q)): B sequences decode that
hold K tokens of context, q prompt tokens are prefilled, which adds m(q) = prefill(q) − prefill(0), and the factor is
the node's at the step's beginning. Divide that time, the factor left out, among those it serves:

- slope[B]·K by the context each holds;
- base[B] to λ equally and to 1 − λ by the KV cache each has reserved: R of at most KV tokens, so that each gets at
  least base[B]·(λ/B + (1 − λ)·R/KV). λ is fixed per node; any λ in [0, 1] will do, and the best is taken;
- m(q) by the tokens each has in it.

The parts of a step add up to no more than the step, so what tasks get in all is no more than the time of all steps. And
each gets at least its *least demand*: per token decoded the least over all batches it can be in (B sequences that
reserve no more than the KV cache holds), at its own context; for its prompt the least over all ways to cut it into
chunks: all of its tokens but those in the last of its chunks are in full steps, since a prompt that is not done fills
its step. Large batches are cheap per token and slow per step, so a task with little time cannot have the cheapest: its
demand is the least among those whose steps end by its deadline (`_Decoding.least`). With watts beside the seconds the
same holds for energy, where a step of prefill alone takes longer than m(q).

**Capacity.** Steps of a node do not overlap, so in any span of time it takes no more of them, factor left out, than the
integral of 1/factor. The factor is that at a step's beginning: each holds for one longest step beyond its interval. A
node that is lost or stalled takes none.

**Prices.** Cut time into spans k. A task on time has had all of its least demand W_jn from one node n, between its
release (submission, dispatch delay and its transfer alone on the link) and its deadline, and only where even an
otherwise empty node would be fast enough. Let y_jnk be the share of its demand that it had in span k (0 for a task that
was late). Then Σ_nk y_jnk ≤ 1 and Σ_j W_jn·y_jnk ≤ C_nk, so for any prices π_nk ≥ 0 and any weight κ ≥ 0 in J per value

    κ·(on-time value) − (energy)  ≤  Σ_nk C_nk·π_nk + Σ_j max(0, max_nk (κ·v_j − E_jnk − W_jn·π_nk))  =: F(κ)

by adding Σ π_nk·(C_nk − Σ_j W_jn·y_jnk) ≥ 0 to the left. So energy ≥ κ·value − F(κ) for every κ, and with E left out
and κ = 1, value ≤ F. The prices come from a linear program (HiGHS), the bound from this sum: were the prices wrong, it
would be loose, and still true.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perllm.broker.errors import BadSetting
from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.token_bins import Floats
from perllm.scheduler.simulator.node import SimulatedNode
from perllm.scheduler.simulator.scenario import Loss, Scenario
from perllm.scheduler.simulator.speed_changes import PiecewiseConstant
from perllm.scheduler.simulator.step_table import StepTable
from perllm.scheduler.simulator.workload import Arrival

Ints = NDArray[np.int64]

#: Ways to divide a step's fixed time that are tried (λ above).
_DIVISIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Prices of a second of a task's time left that are tried (ν in `_Decoding.least`), per second of its demand; for
#: energy, per J at full power.
_TIME_PRICES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
#: Spans time is cut into, and the shortest, s.
_SPANS, _MIN_SPAN = 400, 0.5
#: Spans of a task's time on a node that the first linear program has; others are added where they are cheaper.
_FIRST_SPANS = 4
#: Linear programs solved per bound at most, and the gap to the best possible prices that is good enough.
_ROUNDS, _GAP = 40, 0.002
#: Rounding must not make a true bound false: relative slack on times, energies and the sum.
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class _Tasks:
    """The arrivals, a row each. Tokens, bytes, s."""

    submitted: Floats
    deadline: Floats
    value: Floats
    prompt: Floats
    output: Floats
    limit: Floats
    payload: Floats


class _Demand(NamedTuple):
    """What each task takes at least of one node, alone or in any company; `seconds` and `joules` at factor 1."""

    seconds: Floats  # of step time
    joules: Floats
    able: NDArray[np.bool_]  # whether it could be in time, were the node its own


@dataclass(frozen=True, slots=True)
class Bound:
    """Bounds on one simulation, over all policies."""

    value: float  # on-time value, at most
    share: float  # of all value
    weights: tuple[float, ...]  # κ, J per unit of value
    surplus: tuple[float, ...]  # F(κ), J
    total: float  # value of all tasks

    def least_joules(self, share: float) -> float:
        """J in all that a policy with this on-time share of the value has spent at least, idle power apart."""
        value = share * self.total
        return max(0.0, *(k * value - f for k, f in zip(self.weights, self.surplus, strict=True)))


def bound(
    scenario: Scenario, nodes: Sequence[SimulatedNode], arrivals: Sequence[Arrival], *, energy: bool = True
) -> Bound:
    """The bounds for these arrivals on these nodes: for the run they were simulated in, and every other whose nodes
    drew the same noise (`noise_of`). Without `energy`, on value only. Raises BadSetting without HiGHS."""
    problem = _Problem(scenario, nodes, arrivals)
    value = problem.solve(1.0, with_energy=False)
    weights: list[float] = []
    if energy:
        scale = problem.joules_per_value()
        weights = [scale * x for x in (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)]
    surplus = [problem.solve(k, with_energy=True) for k in weights]
    total = float(problem.tasks.value.sum())
    value = min(value, total)
    return Bound(value, value / total, tuple(weights), tuple(surplus), total)


def noise_of(scenario: Scenario, nodes: Sequence[SimulatedNode], arrivals: Sequence[Arrival]) -> bytes:
    """A digest of all that the nodes drew: a bound holds for runs that have the same."""
    end, digest = max(a.event.deadline for a in arrivals), hashlib.sha256()
    for node in nodes:
        for drawn in (node.step_time_factor, node.seconds_per_byte):
            digest.update(_Values(drawn, scenario.start, end).values.tobytes())
    return digest.digest()


class _Problem:
    """The relaxation: its demands and capacities, and the linear program that finds its prices."""

    def __init__(self, scenario: Scenario, nodes: Sequence[SimulatedNode], arrivals: Sequence[Arrival]) -> None:
        self.tasks = tasks = _columns(arrivals)
        begin = scenario.start
        end = float(tasks.deadline.max()) + _EPSILON
        self.width = max(_MIN_SPAN, (end - begin) / _SPANS)
        spans = math.ceil((end - begin) / self.width)
        count = len(arrivals)
        shape = (len(nodes), count)
        self.seconds, self.joules, self.transfer = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.first, self.last = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        self.capacity, self.factor = np.zeros((len(nodes), spans)), np.ones((len(nodes), spans))
        for n, node in enumerate(nodes):
            speed = _Speed(node, scenario, begin, begin + spans * self.width)
            self.capacity[n], self.factor[n] = speed.spans(begin, self.width, spans)
            link = _Values(node.seconds_per_byte, begin, end)
            fastest = link.least(tasks.submitted, tasks.deadline)
            release = tasks.submitted + scenario.dispatch_delay + tasks.payload * fastest * (1 - _EPSILON)
            enough = speed.until(tasks.deadline) - speed.until(np.minimum(release, tasks.deadline))
            demand = _least_demand(node, tasks, enough)
            self.seconds[n], self.joules[n] = demand.seconds, demand.joules
            self.joules[n] /= 1 + _EPSILON
            self.transfer[n] = tasks.payload * node.spec.link.joules_per_byte
            self.first[n] = np.clip((release - begin) / self.width, 0, spans - 1)
            last = np.clip((tasks.deadline - begin) / self.width, 0, spans - 1).astype(np.int64)
            self.last[n] = np.where(demand.able, last, -1)

    def joules_per_value(self) -> float:
        """J a unit of value costs at least, in the mean over the tasks some node can finish in time."""
        able = self.last >= 0
        least = np.where(able, self.joules + self.transfer, np.inf).min(axis=0)
        some = np.isfinite(least)
        return float(least[some].sum() / max(self.tasks.value[some].sum(), 1e-12)) if some.any() else 1.0

    def solve(self, weight: float, *, with_energy: bool) -> float:
        """F(weight): rounds of a linear program over some of the spans, its prices, and the spans they show to be
        missing."""
        joules = self.joules if with_energy else np.zeros_like(self.joules)
        transfer = self.transfer if with_energy else np.zeros_like(self.joules)
        program = _Program(self, weight, joules, transfer)
        best = math.inf
        for _ in range(_ROUNDS):
            reached, prices = program.solve()
            found, where, gain, paid = _price(
                self.first,
                self.last,
                self.seconds,
                joules,
                transfer,
                self.factor,
                prices,
                weight * self.tasks.value,
            )
            best = min(best, found + float((self.capacity * prices).sum()))
            if best - reached <= _GAP * max(best, 1e-12) or not program.add(where, gain, paid):
                break
        return best * (1 + _EPSILON) + _EPSILON


@compiled
def _price(
    first: Ints,
    last: Ints,
    seconds: Floats,
    joules: Floats,
    transfer: Floats,
    factor: Floats,
    prices: Floats,
    worth: Floats,
) -> tuple[float, Ints, Floats, Floats]:
    """Σ_j max(0, max_nk …) of the module's bound. Also, by node and task, its best span, what it is worth there, and
    what each task has in all."""
    nodes, tasks = first.shape
    best_span = np.full((nodes, tasks), -1)
    gains = np.full((nodes, tasks), -np.inf)
    paid = np.zeros(tasks)
    total = 0.0
    for j in range(tasks):
        most = 0.0
        for n in range(nodes):
            for k in range(first[n, j], last[n, j] + 1):
                gain = worth[j] - transfer[n, j] - joules[n, j] * factor[n, k] - seconds[n, j] * max(prices[n, k], 0.0)
                if gain > gains[n, j]:
                    gains[n, j], best_span[n, j] = gain, k
            most = max(most, gains[n, j])
        paid[j] = most
        total += most
    return total, best_span, gains, paid


class _Program:
    """max Σ (κ·v_j − E_jnk)·y_jnk with Σ_nk y_jnk ≤ 1 and Σ_j W_jn·y_jnk ≤ C_nk, over the columns it has."""

    def __init__(self, problem: _Problem, weight: float, joules: Floats, transfer: Floats) -> None:
        try:
            import highspy  # noqa: PLC0415  part of the extra `simulate`
        except ImportError:
            raise BadSetting("the bound needs HiGHS: pip install 'perllm[simulate]'") from None
        self._problem, self._weight, self._joules, self._transfer = problem, weight, joules, transfer
        self._kind: Any = highspy
        self._solver = solver = self._kind.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("random_seed", 0)
        solver.changeObjectiveSense(highspy.ObjSense.kMaximize)
        tasks = problem.first.shape[1]
        self._tasks = tasks
        upper = np.concatenate([np.ones(tasks), problem.capacity.ravel()])
        empty = np.zeros(0, dtype=np.int32)
        solver.addRows(len(upper), np.full(len(upper), -highspy.kHighsInf), upper, 0, empty, empty, np.zeros(0))
        self._known = np.zeros(0, dtype=np.int64)
        spread = []
        able = problem.last >= problem.first
        for i in range(_FIRST_SPANS):
            at = problem.first + (problem.last - problem.first) * i // (_FIRST_SPANS - 1)
            node, task = np.nonzero(able)
            spread.append(np.stack([node, task, at[node, task]]))
        self._insert(np.concatenate(spread, axis=1))

    def _insert(self, columns: Ints) -> int:
        """Add (node, task, span) columns that are new; returns how many."""
        problem = self._problem
        spans = problem.capacity.shape[1]
        key = np.unique((columns[0] * self._tasks + columns[1]) * spans + columns[2])
        key = np.setdiff1d(key, self._known, assume_unique=True)
        if not len(key):
            return 0
        self._known = np.concatenate([self._known, key])
        n, j, k = key // spans // self._tasks, key // spans % self._tasks, key % spans
        cost = self._weight * problem.tasks.value[j] - self._transfer[n, j] - self._joules[n, j] * problem.factor[n, k]
        rows = np.stack([j, self._tasks + n * spans + k], axis=1).ravel().astype(np.int32)
        entries = np.stack([np.ones(len(key)), problem.seconds[n, j]], axis=1).ravel()
        starts = np.arange(0, 2 * len(key), 2, dtype=np.int32)
        most = np.full(len(key), self._kind.kHighsInf)
        self._solver.addCols(len(key), cost, np.zeros(len(key)), most, len(rows), starts, rows, entries)
        return len(key)

    def solve(self) -> tuple[float, Floats]:
        """The optimum over these columns, and the prices of the nodes' spans, (nodes, spans)."""
        self._solver.run()
        prices = np.array(self._solver.getSolution().row_dual[self._tasks :]).reshape(self._problem.capacity.shape)
        return float(self._solver.getInfo().objective_function_value), np.maximum(prices, 0.0)

    def add(self, where: Ints, gain: Floats, paid: Floats) -> int:
        """Add each task's best span on every node where it is worth more there than what the task has."""
        better = (where >= 0) & (gain > 0) & (gain >= paid * (1 - 0.02))
        node, task = np.nonzero(better)
        return self._insert(np.stack([node, task, where[node, task]]))


def _columns(arrivals: Sequence[Arrival]) -> _Tasks:
    events = [a.event for a in arrivals]

    def column(*values: float) -> Floats:
        return np.array(values, dtype=float)

    return _Tasks(
        submitted=column(*(e.at for e in events)),
        deadline=column(*(e.deadline for e in events)),
        value=column(*(e.value for e in events)),
        prompt=column(*(e.prompt_tokens for e in events)),
        output=column(*(min(a.output, a.event.max_tokens) for a in arrivals)),
        limit=column(*(e.max_tokens for e in events)),
        payload=column(*(e.payload_bytes for e in events)),
    )


# --- least demand


def _least_demand(node: SimulatedNode, tasks: _Tasks, enough: Floats) -> _Demand:
    """`enough`: s of step time the node could take from each task's release to its deadline."""
    spec, table = node.spec, node.table
    room = spec.context - tasks.prompt
    fits = room > 0
    room = np.maximum(room, 1)
    output = np.minimum(tasks.output, room)
    reserve = tasks.prompt + np.minimum(tasks.limit, room)
    fits &= reserve <= spec.kv_tokens
    decoded = np.maximum(output - 1, 0)  # the prefill yields the first token
    prompts, inverse = np.unique(tasks.prompt, return_inverse=True)
    prefill = np.array([_least_prefill(table, p, spec.chunk) for p in prompts])[inverse]
    prefill_alone = np.array([_prefill_alone(table, p, spec.chunk) for p in prompts])[inverse]
    least = float(reserve[fits].min()) if fits.any() else 1.0
    decoding = _Decoding(
        table,
        first=tasks.prompt + 1,
        last=tasks.prompt + np.maximum(decoded, 1),
        count=decoded,
        company=np.clip(1 + np.floor((spec.kv_tokens - reserve) / least), 1, spec.slots),
        kv_share=np.minimum(reserve / spec.kv_tokens, 1.0),
        beside=float(prompts[0]) + 1,
    )
    watts = np.array(table.watts) - table.idle_watts
    left = np.maximum(enough * (1 + _EPSILON) - prefill_alone, 0.0)
    seconds = [decoding.least(np.ones_like(watts), d, left) for d in _DIVISIONS]
    joules = [decoding.least(watts, d, left) for d in _DIVISIONS]
    alone = prefill_alone + decoding.alone()
    some = fits & (alone <= enough * (1 + _EPSILON))
    return _Demand(
        seconds=max(seconds, key=lambda x: float(x[some].sum())) + prefill,
        joules=max(joules, key=lambda x: float(x[some].sum())) + prefill * (table.prefill_watts - table.idle_watts),
        able=some,
    )


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What the tasks decode on one node, a row each: `count` tokens at contexts from `first` to `last`.

    Every cost here is, per token, the least of functions that are linear in its context, so concave in it; the sum over
    consecutive contexts is then no less than their number times the mean of its ends.
    """

    table: StepTable
    first: Floats  # tokens
    last: Floats
    count: Floats
    company: Floats  # sequences a batch with the task can have
    kv_share: Floats  # of the KV cache it reserves
    beside: float  # context every other sequence has at least, tokens

    def alone(self) -> Floats:
        """s of the fastest steps there are."""
        return self._sum(np.zeros(len(self.table.base)), 0.0, 1.0)

    def least(self, watts: Floats, division: float, left: Floats) -> Floats:
        """Least demand of tasks with `left` s of step time: large batches are cheap, but their steps are long. For any
        price ν of a second, cost ≥ (cost + ν·time) − ν·left, since the time is at most what is left."""
        found = self._sum(watts, division, 0.0)
        for price in _TIME_PRICES:
            nu = price * float(watts.max())
            found = np.maximum(found, self._sum(watts, division, nu) - nu * left)
        return found

    def _sum(self, watts: Floats, division: float, price: float) -> Floats:
        """Σ over the tokens of the least over batches of watts·(its part of the step) + price·(the step)."""
        ends = []
        for context in (self.first, self.last):
            least = np.full(len(context), np.inf)
            for batch in range(1, len(self.table.base)):
                base, slope = self.table.base[batch], self.table.slope[batch]
                part = base * (division / batch + (1 - division) * self.kv_share) + slope * context
                step = base + slope * (context + (batch - 1) * self.beside)
                cost = watts[batch] * part + price * step
                least = np.where(batch <= self.company, np.minimum(least, cost), least)
            ends.append(least)
        total: Floats = self.count * (ends[0] + ends[1]) / 2
        return total


def _added(table: StepTable, tokens: float) -> float:
    """s a chunk of so many tokens adds to a step."""
    return table.prefill(tokens) - table.prefill_seconds[0] if tokens > 0 else 0.0


def _least_prefill(table: StepTable, prompt: float, chunk: int) -> float:
    """Least demand of a prompt: s of its tokens are in the last of its steps, which holds s to `chunk` tokens in all,
    the others in full ones. The sum is piecewise linear in s or in the last step's size, so its least is at the
    table's points or at the ends."""
    points = [x for x in table.prefill_tokens if 0 < x < chunk] + [float(chunk)]
    full = _added(table, chunk) / chunk
    most = min(prompt, float(chunk))
    found = [prompt * full]
    for last in [*(x for x in points if x <= most), most]:
        rate = min(_added(table, q) / q for q in [last, *(x for x in points if x >= last)])
        found.append((prompt - last) * full + last * rate)
    return min(found)


def _prefill_alone(table: StepTable, prompt: float, chunk: int) -> float:
    """s the steps of a prompt take at least: as few as can be, each with its tokens in it."""
    floor = min(table.prefill_seconds[0], *table.base[1:])
    full = math.ceil(prompt / chunk) - 1
    return full * (floor + _added(table, chunk)) + floor + _added(table, prompt - full * chunk)


# --- capacity


class _Values:
    """A piecewise constant function over [begin, end], as arrays."""

    def __init__(self, function: PiecewiseConstant, begin: float, end: float) -> None:
        starts, ends, values, time = [], [], [], begin
        while time <= end:
            value, until = function.at(time)
            starts.append(time)
            ends.append(until)
            values.append(value)
            time = until
        self.starts, self.ends, self.values = np.array(starts), np.array(ends), np.array(values)

    def least(self, begin: Floats, end: Floats) -> Floats:
        """The least value within each [begin, end]."""
        first = np.searchsorted(self.starts, begin, side="right") - 1
        last = np.searchsorted(self.starts, end, side="right")
        return np.array([self.values[a:b].min() for a, b in zip(np.maximum(first, 0), last, strict=True)])


class _Speed:
    """A node's greatest speed (step time it can take per s) as a function of time."""

    def __init__(self, node: SimulatedNode, scenario: Scenario, begin: float, end: float) -> None:
        known = _Values(node.step_time_factor, begin, end)
        table, spec = node.table, node.spec
        decoding = max(b + s * spec.kv_tokens for b, s in zip(table.base, table.slope, strict=True))
        longest = max(decoding, table.prefill_seconds[0]) + _added(table, spec.chunk)
        reach = known.ends + np.where(np.isfinite(known.values), known.values, 0.0) * longest * (1 + _EPSILON)
        edges = np.unique(np.concatenate([known.starts, known.ends, reach, [begin, end]]))
        lost = [f for f in scenario.fault if isinstance(f, Loss) and node.name in f.nodes]
        edges = np.unique(np.concatenate([edges, *([scenario.start + f.start, scenario.start + f.end] for f in lost)]))
        self._edges = edges[(edges >= begin) & (edges <= end)]
        speed = np.zeros(len(self._edges) - 1)
        for start, until, factor in zip(known.starts, reach, known.values, strict=True):
            if math.isfinite(factor):
                a, b = np.searchsorted(self._edges, [start, until])
                speed[a:b] = np.maximum(speed[a:b], 1.0 / factor)
        for fault in lost:
            a, b = np.searchsorted(self._edges, [scenario.start + fault.start, scenario.start + fault.end])
            speed[a:b] = 0.0
        self._speed = speed
        self._taken = np.concatenate([[0.0], np.cumsum(speed * np.diff(self._edges))])

    def until(self, time: Floats) -> Floats:
        """s of step time up to `time`."""
        taken: Floats = np.interp(time, self._edges, self._taken)
        return taken

    def spans(self, begin: float, width: float, count: int) -> tuple[Floats, Floats]:
        """Per span, its capacity (s of step time) and the least factor on a step's time and energy."""
        bounds: Floats = begin + width * np.arange(count + 1, dtype=float)
        capacity = np.diff(self.until(bounds))
        first = np.maximum(np.searchsorted(self._edges, bounds[:-1], side="right") - 1, 0)
        last = np.searchsorted(self._edges, bounds[1:], side="left")
        speed = [self._speed[a:b].max(initial=0.0) for a, b in zip(first, last, strict=True)]
        return capacity, np.array([1.0 / s if s > 0 else 1.0 for s in speed])
