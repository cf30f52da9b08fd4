"""The simulated engine against its table, and its closed form against taking every step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perllm.scheduler.simulator.clock import Clock
from perllm.scheduler.simulator.engine import Engine, Request, elapsed, steps_until
from perllm.scheduler.simulator.scenario import Link, NodeSpec
from perllm.scheduler.simulator.speed_changes import PiecewiseConstant, Slowdown, StepTimeFactor
from perllm.scheduler.simulator.step_table import StepTable, load_table

CLOUD = load_table("vllm-0.25.1_h200_llama-33b-bf16", 8, time=1.0, power=1.0)
EDGE = load_table("llamacpp-0.3.36_xeon-spr_llama-8b-q4_0", 8, time=0.1, power=1.0, cpu_watts=(15, 60))


def steady(begin: float = 0.0) -> PiecewiseConstant:
    return PiecewiseConstant(1e9, [], begin)


@dataclass
class PlannedRequest:
    at: float
    prompt: int
    output: int
    stop: float | None = None


@dataclass
class Left:
    """When a request left the engine, with how many tokens, for how much energy."""

    at: dict[int, float] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)
    joules: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    busy: float = 0.0
    context_steps: float = 0.0


def simulate(
    requests: list[PlannedRequest], table: StepTable, factors: PiecewiseConstant, slots: int, kv: int, chunk: int
) -> Left:
    """With the engine under test."""
    clock, left = Clock(), Left()
    engine = Engine(clock, table, factors, slots=slots, kv_tokens=kv, chunk=chunk)

    def end(sequence: Request) -> None:
        i = int(sequence.id)
        left.at[i], left.generated[i], left.joules[i] = clock.now, sequence.generated, sequence.joules

    def arrive(i: int, request: PlannedRequest) -> None:
        sequence = Request(str(i), request.prompt, request.output, request.prompt + request.output, end)
        if request.stop is not None:
            clock.at(request.stop, lambda: engine.stop(sequence) if i not in left.at else None)
        engine.enter(sequence)

    for i, request in enumerate(requests):
        clock.at(request.at, lambda i=i, request=request: arrive(i, request))
    while clock.step():
        pass
    totals = engine.counters()
    left.steps, left.busy, left.context_steps = totals.steps, totals.busy, totals.context_steps
    assert totals.generated == sum(left.generated.values())
    assert (totals.active, totals.waiting, totals.free_kv) == (0, 0, kv)
    assert sum(left.joules.values()) == pytest.approx(totals.energy - table.idle_watts * clock.now, rel=1e-9, abs=1e-6)
    return left


def one_by_one(
    requests: list[PlannedRequest], table: StepTable, factors: PiecewiseConstant, slots: int, kv: int, chunk: int
) -> Left:
    """The same, step by step, as plainly as can be."""
    left, time = Left(), 0.0
    coming = sorted(range(len(requests)), key=lambda i: requests[i].at)
    waiting: list[int] = []
    batch: dict[int, list[int]] = {}  # request → [prefilled, generated]

    def leave(i: int) -> None:
        left.at[i], left.generated[i] = time, batch.pop(i, [0, 0])[1]

    while len(left.at) < len(requests):
        while coming and requests[coming[0]].at <= time:
            waiting.append(coming.pop(0))
        for i in [*waiting, *batch]:
            stop = requests[i].stop
            if stop is not None and max(stop, requests[i].at) <= time:
                leave(i)
                if i in waiting:
                    waiting.remove(i)
        while waiting and len(batch) < slots:
            held = sum(requests[i].prompt + requests[i].output for i in [*batch, waiting[0]])
            if held > kv:
                break
            batch[waiting.pop(0)] = [0, 0]
        if not batch:
            events = [requests[i].at for i in coming]
            events += [max(s, requests[i].at) for i in [*waiting, *coming] if (s := requests[i].stop) is not None]
            time = min((t for t in events if t > time), default=time)
            continue
        decoding = [i for i, (p, g) in batch.items() if g > 0]
        context = sum(requests[i].prompt + batch[i][1] for i in decoding)
        room, chunks = chunk, {}
        for i, (prefilled, generated) in batch.items():
            if generated == 0 and room > 0:
                chunks[i] = min(room, requests[i].prompt - prefilled)
                room -= chunks[i]
        factor, until = factors.at(time)
        while math.isinf(factor):
            left.busy, time = left.busy + until - time, until
            factor, until = factors.at(time)
        step = factor * table.mixed(len(decoding), context, chunk - room)
        time += step
        left.steps, left.busy, left.context_steps = left.steps + 1, left.busy + step, left.context_steps + context
        for i in decoding:
            batch[i][1] += 1
        for i, n in chunks.items():
            batch[i][0] += n
            batch[i][1] = int(batch[i][0] == requests[i].prompt)
        for i in [i for i, (_, g) in batch.items() if g == requests[i].output]:
            leave(i)
    return left


@pytest.mark.parametrize("table", [CLOUD, EDGE])
@pytest.mark.parametrize(("prompt", "output"), [(300, 1), (300, 2), (1, 40), (700, 120)])
def test_a_lone_request_takes_what_the_table_says(table: StepTable, prompt: int, output: int) -> None:
    left = simulate([PlannedRequest(0.0, prompt, output)], table, steady(), slots=4, kv=8192, chunk=2048)
    decode = sum(table.decode(1, prompt + i) for i in range(1, output))
    assert left.at[0] == pytest.approx(table.prefill(prompt) + decode, rel=1e-12)
    assert left.steps == output


def test_a_long_prompt_is_prefilled_in_chunks_beside_the_others() -> None:
    table = CLOUD
    left = simulate(
        [PlannedRequest(0, 10, 500), PlannedRequest(1, 1000, 5)], table, steady(), slots=4, kv=8192, chunk=256
    )
    alone = simulate([PlannedRequest(0, 10, 500)], table, steady(), slots=4, kv=8192, chunk=256)
    # Four chunks at the price of their tokens, then four steps in a batch of two
    price = sum(table.prefill(n) - table.prefill_seconds[0] for n in (256, 256, 256, 232))
    assert left.at[0] - alone.at[0] >= price
    assert left.at[0] - alone.at[0] == pytest.approx(price, rel=0.05)


requests = st.lists(
    st.builds(
        PlannedRequest,
        at=st.floats(0, 5),
        prompt=st.integers(1, 600),
        output=st.integers(1, 60),
        stop=st.none() | st.floats(0, 8),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(requests, st.sampled_from([CLOUD, EDGE]), st.integers(1, 6), st.integers(16, 512), st.integers(0, 99))
def test_the_closed_form_is_taking_every_step(
    arrivals: list[PlannedRequest], table: StepTable, slots: int, chunk: int, seed: int
) -> None:
    for request in arrivals:  # a stop before the request is there has no meaning
        if request.stop is not None:
            request.stop += request.at
    spec = NodeSpec(
        name="n", tier="edge", profile="", slots=8, kv_tokens=4096, chunk=1, link=Link(bandwidth=1), noise=0.3
    )
    changes = [Slowdown(1.0, 2.5, 2.5), Slowdown(3.0, 3.7, math.inf)]

    def factors() -> PiecewiseConstant:
        return StepTimeFactor(spec, changes, 0.0, np.random.default_rng(seed))

    fast = simulate(arrivals, table, factors(), slots, 1200, chunk)
    slow = one_by_one(arrivals, table, factors(), slots, 1200, chunk)
    assert fast.generated == slow.generated
    assert fast.steps == slow.steps
    assert fast.busy == pytest.approx(slow.busy, rel=1e-9)
    assert fast.context_steps == pytest.approx(slow.context_steps, rel=1e-9)
    for i, at in slow.at.items():
        assert fast.at[i] == pytest.approx(at, rel=1e-9)


@given(st.floats(1e-4, 1.0), st.floats(0, 1e-2), st.floats(0, 100))
def test_steps_until_is_the_first_that_reaches(first: float, growth: float, span: float) -> None:
    steps = steps_until(first, growth, span)
    assert elapsed(first, growth, steps) >= span
    assert steps == 1 or elapsed(first, growth, steps - 1) < span


def test_counters_between_two_steps_count_whole_steps_only() -> None:
    clock = Clock()
    engine = Engine(clock, CLOUD, steady(), slots=4, kv_tokens=8192, chunk=2048)
    engine.enter(Request("a", 64, 100, 200, lambda _: None))
    seen = []
    for i in range(1, 36):
        clock.at(i * 0.05, lambda: seen.append((clock.now, engine.counters(), engine.progress()["a"])))
    while clock.step() and len(seen) < 35:
        pass
    prefill = CLOUD.prefill(64)
    for now, counters, generated in seen:
        done, time = 1, prefill
        while time + CLOUD.decode(1, 64 + done) <= now:
            time += CLOUD.decode(1, 64 + done)
            done += 1
        if now < prefill:
            done, time = 0, 0.0
        assert (counters.steps, counters.generated, generated) == (done, done, done)
        assert counters.busy == pytest.approx(time)
        assert counters.since_progress == pytest.approx(now - time)


def test_the_longest_step_is_forgotten_after_a_minute() -> None:
    clock = Clock()
    engine = Engine(
        clock, CLOUD, PiecewiseConstant(1e9, [Slowdown(5, 7, math.inf)], 0), slots=4, kv_tokens=8192, chunk=2048
    )
    engine.enter(Request("a", 64, 4000, 200, lambda _: None))
    seen: dict[float, float] = {}
    for at in (4.0, 8.0, 30.0, 75.0):
        clock.at(at, lambda: seen.update({clock.now: engine.counters().longest_step}))
    while clock.step():
        pass
    assert seen[4.0] < 0.1
    assert 1.9 < seen[8.0] < 2.1
    assert 1.9 < seen[30.0] < 2.1
    assert seen[75.0] < 0.3
