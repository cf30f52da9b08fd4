"""What arrives: a list of tasks with their true output lengths, drawn from a scenario's classes and arrivals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from perllm.broker.messages import Submitted
from perllm.broker.text_features import sketch
from perllm.scheduler.simulator.csv_trace import RequestTrace, read_csv_trace
from perllm.scheduler.simulator.scenario import (
    Arrivals,
    Constant,
    Distribution,
    Hint,
    Lognormal,
    Mmpp,
    Pareto,
    Poisson,
    Replay,
    Scenario,
    ServiceClass,
    Texts,
    Uniform,
)
from perllm.scheduler.simulator.text_trace import TextTrace, read_text_trace

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One task as it arrives, and what nobody knows yet: the tokens it will generate if nothing stops it."""

    event: Submitted
    output: int  # tokens, true
    text: str | None = None  # the prompt, where it is recorded


def draw(distribution: Distribution, size: int, rng: np.random.Generator) -> Floats:
    """`size` independent values."""
    match distribution:
        case Constant():
            return np.full(size, distribution.value)
        case Uniform():
            return rng.uniform(distribution.low, distribution.high, size)
        case Lognormal():
            values = distribution.median * np.exp(distribution.sigma * rng.standard_normal(size))
            return _cut(values, distribution.most)
        case Pareto():
            return _cut(distribution.least * (1.0 + rng.pareto(distribution.alpha, size)), distribution.most)
        case _:
            assert_never(distribution)


def _cut(values: Floats, most: float | None) -> Floats:
    return values if most is None else np.minimum(values, most).astype(np.float64)


def draw_tokens(distribution: Distribution, size: int, rng: np.random.Generator, most: float = math.inf) -> Floats:
    """Whole token counts, at least 1 and at most `most`."""
    whole: Floats = np.clip(np.rint(draw(distribution, size, rng)), 1, most)
    return whole


def make_arrivals(scenario: Scenario, rate: float, seed: int) -> list[Arrival]:
    """`scenario.tasks` arrivals at `rate` tasks/s in the mean, in order of time."""
    rng = np.random.default_rng([seed, 1])
    count = scenario.tasks
    recorded = read_csv_trace(scenario.arrivals.file) if isinstance(scenario.arrivals, Replay) else None
    texts = read_text_trace(scenario.arrivals.file) if isinstance(scenario.arrivals, Texts) else None
    if recorded is not None:
        count = min(count, len(recorded.times))
    if texts is not None:
        count = min(count, len(texts.texts))
    times = scenario.start + _times(scenario, recorded, count, rate, rng)
    shares = np.array([s.share for s in scenario.service])
    kinds = rng.choice(len(shares), size=count, p=shares / shares.sum())
    lines = rng.permutation(len(texts.texts))[:count].tolist() if texts is not None else []
    if texts is not None:
        named = {service.name: index for index, service in enumerate(scenario.service)}
        kinds = np.array([named.get(texts.classes[x], k) for x, k in zip(lines, kinds.tolist(), strict=True)])
    found: list[Arrival | None] = [None] * count
    for index, service in enumerate(scenario.service):
        chosen = np.flatnonzero(kinds == index)
        columns = _columns(service, service.hint or scenario.hint, len(chosen), rng)
        for position, row in zip(chosen.tolist(), zip(*columns, strict=True), strict=True):
            prompt, output, deadline, payload, hint = row
            if recorded is not None:
                prompt, output = recorded.prompts[position], min(recorded.outputs[position], service.max_tokens)
            if texts is not None:
                line = lines[position]
                prompt, output = texts.prompts[line], min(texts.outputs[line], service.max_tokens)
            at = float(times[position])
            text = texts.texts[lines[position]] if texts is not None else None
            event = Submitted.model_construct(
                id=f"t{position}",
                at=at,
                deadline=at + deadline,
                value=service.value,
                service=service.name,
                model=None,
                prompt_tokens=int(prompt),
                payload_bytes=int(payload),
                max_tokens=service.max_tokens,
                expected_tokens=int(hint) if hint > 0 else None,
                strikes=0,
                text="" if text is None else sketch([text]),
            )
            found[position] = Arrival(event, int(output), text)
    return [a for a in found if a is not None]


def mean_task(scenario: Scenario) -> tuple[float, float, float]:
    """The mean task's prompt, output and KV reservation (prompt and max_tokens), tokens. Estimated from draws, since
    cut distributions have no handy mean; always the same ones."""
    return _mean_task(scenario.arrivals, scenario.service)


@lru_cache(maxsize=16)
def _mean_task(arrivals: Arrivals, services: tuple[ServiceClass, ...]) -> tuple[float, float, float]:
    if isinstance(arrivals, Replay | Texts):
        recorded: RequestTrace | TextTrace
        recorded = read_csv_trace(arrivals.file) if isinstance(arrivals, Replay) else read_text_trace(arrivals.file)
        prompt, output = float(np.mean(recorded.prompts)), float(np.mean(recorded.outputs))
        return prompt, output, prompt + max(s.max_tokens for s in services)
    rng, shares = np.random.default_rng(0), sum(s.share for s in services)
    means = np.zeros(3)
    for service in services:
        prompts = draw_tokens(service.prompt, 20_000, rng)
        outputs = draw_tokens(service.output, 20_000, rng, service.max_tokens)
        row = (prompts.mean(), outputs.mean(), prompts.mean() + service.max_tokens)
        means += service.share / shares * np.array(row)
    return float(means[0]), float(means[1]), float(means[2])


def _columns(service: ServiceClass, hints: Hint | None, size: int, rng: np.random.Generator) -> tuple[list[float], ...]:
    """Prompt tokens, output tokens, deadline (s), payload (bytes), hint (tokens; 0: none) of `size` tasks."""
    output = draw_tokens(service.output, size, rng, service.max_tokens)
    hint = np.zeros(size)
    if hints is not None:
        given = rng.random(size) < hints.share
        guess = np.clip(np.rint(output * np.exp(hints.sigma * rng.standard_normal(size))), 1, service.max_tokens)
        hint = np.where(given, guess, 0.0)
    return (
        draw_tokens(service.prompt, size, rng).tolist(),
        output.tolist(),
        draw(service.deadline, size, rng).tolist(),
        draw(service.payload, size, rng).tolist(),
        hint.tolist(),
    )


def _times(
    scenario: Scenario, recorded: RequestTrace | None, count: int, rate: float, rng: np.random.Generator
) -> Floats:
    """Arrival times, s from the start, `rate` tasks/s in the mean."""
    match scenario.arrivals:
        case Poisson() | Texts():
            return np.cumsum(rng.exponential(1.0 / rate, count))
        case Mmpp() as mmpp:
            return _mmpp(mmpp, count, rate, rng)
        case Replay():
            assert recorded is not None
            times: Floats = np.array(recorded.times[:count])
            times *= count / rate / max(float(times[-1]), 1e-9)
            return times
        case _:
            assert_never(scenario.arrivals)


def _mmpp(mmpp: Mmpp, count: int, rate: float, rng: np.random.Generator) -> Floats:
    """Exponential dwell times in two states; in each, Poisson arrivals at its rate."""
    calm_rate = rate * (mmpp.busy + mmpp.calm) / (mmpp.busy * mmpp.burst + mmpp.calm)
    times: list[float] = []
    now, busy = 0.0, False
    while len(times) < count:
        dwell = rng.exponential(mmpp.busy if busy else mmpp.calm)
        arrivals = rng.poisson(calm_rate * (mmpp.burst if busy else 1.0) * dwell)
        times.extend((now + np.sort(rng.uniform(0.0, dwell, arrivals))).tolist())
        now, busy = now + dwell, not busy
    return np.array(times[:count])
