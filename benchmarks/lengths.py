"""`make bench-lengths`: how well output lengths are forecast from the class, the prompt's size, and the text.

Progressive: each task is forecast, then learned, in random order, over several orders. Forecasters:

- `by_class`: a decayed histogram per class; `by_size`: per class and prompt size (what there is without text).
- `point`: a regressor of log length on the same words and word pairs, one number per task: its CRPS is its error.
- `text`: the mixture the scheduler uses.

Per forecaster, with classes and without, of the tasks after the first 100, 1,000 and 10,000: CRPS of log length and of
tokens, the log score (nats per task, of the exact token count), how often lengths were below the forecast's 50, 90 and
99 % quantiles. `..._of_by_size` are ratios to `by_size`. Then three made workloads: prompts that come again, templates
with changing fields, and lengths that double midway. And the time per prompt, at submission and in the scheduler.

`--half even` and `odd` take half of the prompts each (by checksum): to tune on one and report the other.
A token is 4.2 characters in every class.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import emit
from perllm.broker.text_features import Sketch, parse, sketch
from perllm.scheduler.csucb.output_lengths import Lengths
from perllm.scheduler.csucb.text_model import codes_of
from perllm.scheduler.csucb.token_bins import BINS, EDGES

PROMPTS = Path(__file__).parents[2] / "shared" / "lengths" / "gpteacher.jsonl.gz"
CHARACTERS_PER_TOKEN = 4.2
MAX_TOKENS = 2048
STARTS = (100, 1000, 10_000)
QUANTILES = (0.5, 0.9, 0.99)
#: Where the CRPS of log length is summed up.
_LOG_GRID = np.linspace(math.log(0.5), math.log(4 * MAX_TOKENS), 400)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Task:
    service: str
    size: int  # of the prompt, tokens
    text: Sketch
    tokens: int  # of the answer


class Point:
    """Online ridge-like regression of log length on hashed codes: one number per task, no distribution."""

    def __init__(self) -> None:
        self._weights, self._seen = np.zeros(1 << 16), np.zeros(1 << 16)
        self._mean: dict[str, list[float]] = {}

    def forecast(self, task: Task) -> float:
        """Tokens."""
        codes = codes_of(task.text, task.service, task.size, MAX_TOKENS, None)
        mean = self._mean.setdefault(task.service, [4.0, 0.0])
        return math.exp(mean[0] + self._weights[codes].sum() / math.sqrt(len(codes)))

    def learn(self, task: Task) -> None:
        codes = codes_of(task.text, task.service, task.size, MAX_TOKENS, None)
        off = math.log(task.tokens) - math.log(self.forecast(task))
        rates = 3.0 / np.sqrt(1.0 + self._seen[codes])
        self._weights[codes] += rates / math.sqrt(len(codes)) * off / (1.0 + rates.mean())
        self._seen[codes] += 1.0
        mean = self._mean[task.service]
        mean[1] += 1.0
        mean[0] += off / (mean[1] + 1.0) if mean[1] < 300 else off / 300


def read(path: Path, half: str | None) -> list[Task]:
    """The prompts with the lengths of their answers."""
    tasks = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if half is None or crc32(row["prompt"].encode()) % 2 == ("even", "odd").index(half):
                tasks.append(_task(row["class"], row["prompt"], row["output_chars"] / CHARACTERS_PER_TOKEN))
    return tasks


def _task(service: str, prompt: str, tokens: float) -> Task:
    return Task(service, len(prompt.encode()) // 4 + 1, parse(sketch([prompt])), max(1, math.ceil(tokens)))


def distributions(lengths: Lengths, tasks: Iterable[Task]) -> Floats:
    """P(L > x) at the bins' edges, (tasks, BINS + 1), each before its task is learned."""
    tails = []
    for task in tasks:
        row = lengths.row(task.service, task.size, text=task.text, max_tokens=MAX_TOKENS)
        lengths.refresh()
        tails.append(lengths.table["tail"][row].copy())
        lengths.observe(task.service, task.size, task.tokens, ended=True, text=task.text, max_tokens=MAX_TOKENS)
    return np.array(tails)


def points(tasks: Iterable[Task]) -> Floats:
    """Tokens forecast, (tasks,), each before its task is learned."""
    regressor, found = Point(), []
    for task in tasks:
        found.append(regressor.forecast(task))
        regressor.learn(task)
    return np.array(found)


def scores(tails: Floats, tokens: Floats, rng: np.random.Generator) -> dict[str, Floats]:
    """Per task: the CRPS of log length and of tokens, the log score, and the probability integral transform (drawn
    within the token, since lengths are whole)."""
    widths = np.diff(EDGES)
    last = int(np.searchsorted(EDGES, 4 * MAX_TOKENS))
    crps_log, crps, score, pit = (np.empty(len(tokens)) for _ in range(4))
    steps = np.diff(_LOG_GRID)
    grid = np.exp(_LOG_GRID)
    fine = np.unique(np.concatenate([np.linspace(a, b, 5) for a, b in pairwise(EDGES[: last + 1])]))
    fine_steps = np.diff(fine)
    for n, (tail, y) in enumerate(zip(tails, tokens, strict=True)):
        below = 1.0 - np.interp(grid, EDGES, tail)
        off = (below - (grid >= y)) ** 2
        crps_log[n] = ((off[1:] + off[:-1]) / 2 * steps).sum()
        below = 1.0 - np.interp(fine, EDGES, tail)
        off = (below - (fine >= y)) ** 2
        crps[n] = ((off[1:] + off[:-1]) / 2 * fine_steps).sum()
        i = min(int(np.searchsorted(EDGES, y)) - 1, BINS - 1)
        score[n] = -math.log(max((tail[i] - tail[i + 1]) / widths[i], 1e-12))
        low, high = 1.0 - np.interp([y - 1, y], EDGES, tail)
        pit[n] = low + rng.random() * (high - low)
    return {"crps_log": crps_log, "crps_tokens": crps, "log_score": score, "pit": pit}


def point_scores(forecast: Floats, tokens: Floats) -> dict[str, Floats]:
    return {"crps_log": np.abs(np.log(forecast / tokens)), "crps_tokens": np.abs(forecast - tokens)}


def summary(per_task: dict[str, Floats]) -> dict[str, float]:
    found = {name: float(values.mean()) for name, values in per_task.items() if name != "pit"}
    if "pit" in per_task:
        found |= {f"below_q{100 * q:.0f}": float((per_task["pit"] <= q).mean()) for q in QUANTILES}
    return found


FORECASTERS: dict[str, dict[str, bool]] = {
    "by_class": {"by_size": False, "use_text": False},
    "by_size": {"use_text": False},
    "text": {},
}


def compare(orders: Sequence[list[Task]]) -> dict[str, dict[str, dict[str, float]]]:
    """Start → forecaster → figures, over the tasks from each start up to the next tenfold."""
    found: dict[str, dict[str, list[dict[str, Floats]]]] = {}
    for number, tasks in enumerate(orders):
        tokens, rng = np.array([t.tokens for t in tasks], float), np.random.default_rng(number)
        each = {name: scores(distributions(Lengths(**on), tasks), tokens, rng) for name, on in FORECASTERS.items()}
        each["point"] = point_scores(points(tasks), tokens)
        for start, end in _windows(len(tasks)):
            for name, per_task in each.items():
                part = {key: values[start:end] for key, values in per_task.items()}
                found.setdefault(str(start), {}).setdefault(name, []).append(part)
    return {
        start: {
            name: summary({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
            for name, parts in forecasters.items()
        }
        for start, forecasters in found.items()
    }


def _windows(count: int) -> list[tuple[int, int]]:
    """From each start on as many tasks again, or all there are."""
    return [(start, min(2 * start, count)) for start in STARTS if start < count]


# --- made workloads


def repeats(tasks: Sequence[Task], rng: random.Random, count: int = 4000) -> list[Task]:
    """Some prompts again and again (Zipf), answered alike every time."""
    some = rng.sample(list(tasks), 1000)
    return rng.choices(some, weights=[1 / (i + 1) for i in range(len(some))], k=count)


def templates(path: Path, rng: random.Random, count: int = 4000) -> list[Task]:
    """40 templates, each around a field of 40 words that are never the same; a template's answers differ by 15 %."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    words = [w for p in rng.sample(prompts, 500) for w in p.split()]
    heads = list({p[:40]: p[:120] for p in rng.sample(prompts, 500)}.values())  # many of one class begin alike
    kinds = [(head, rng.lognormvariate(4.5, 1.0)) for head in rng.sample(heads, 40)]
    made = []
    for _ in range(count):
        head, tokens = rng.choice(kinds)
        made.append(
            _task("batch", f"{head} {' '.join(rng.choices(words, k=40))}", tokens * rng.lognormvariate(0, 0.15))
        )
    return made


def doubling(tasks: Sequence[Task]) -> list[Task]:
    """From the middle on every answer is twice as long."""
    middle = len(tasks) // 2
    return [*tasks[:middle], *(replace(t, tokens=2 * t.tokens) for t in tasks[middle:])]


def made(name: str, tasks: list[Task], start: int, end: int) -> dict[str, float]:
    """CRPS of log length over some of the tasks, and its ratio to `by_size`."""
    tokens, rng = np.array([t.tokens for t in tasks], float), np.random.default_rng(0)
    found = {
        kind: summary({k: v[start:end] for k, v in scores(distributions(Lengths(**on), tasks), tokens, rng).items()})
        for kind, on in FORECASTERS.items()
    }
    text, by_size = found["text"], found["by_size"]
    return {
        f"{name}_crps_log": text["crps_log"],
        f"{name}_crps_log_of_by_size": text["crps_log"] / by_size["crps_log"],
        f"{name}_log_score_gain": by_size["log_score"] - text["log_score"],
    }


def timing(path: Path, tasks: Sequence[Task]) -> dict[str, float]:
    """CPU µs per prompt: its sketch at submission; a forecast and a lesson in the scheduler, with and without text."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        prompts = [[json.loads(line)["prompt"]] for line in lines][::10]
    found = {}
    best = math.inf
    for _ in range(5):
        began = time.process_time()
        for prompt in prompts:
            sketch(prompt, "acme")
        best = min(best, (time.process_time() - began) / len(prompts))
    found["sketch_us"] = best * 1e6
    for name in ("by_size", "text"):
        lengths = Lengths(**FORECASTERS[name])
        distributions(lengths, tasks[:500])
        forecast, lesson = [], []
        for task in tasks[500:2500]:
            began = time.process_time()
            lengths.row(task.service, task.size, text=task.text, max_tokens=MAX_TOKENS)
            lengths.refresh()
            between = time.process_time()
            lengths.observe(task.service, task.size, task.tokens, ended=True, text=task.text, max_tokens=MAX_TOKENS)
            forecast.append(between - began)
            lesson.append(time.process_time() - between)
        found[f"{name}_forecast_us"] = float(np.mean(forecast)) * 1e6
        found[f"{name}_lesson_us"] = float(np.mean(lesson)) * 1e6
        snapshot = {"lengths": lengths.snapshot(), "texts": lengths.snapshot_texts()}
        found[f"{name}_snapshot_kb"] = len(json.dumps(snapshot)) / 1000
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=PROMPTS, help="gzipped JSON lines: class, prompt, output_chars")
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--seed", type=int, default=100, help="of the first order")
    parser.add_argument("--half", choices=("even", "odd"))
    parser.add_argument("--quick", action="store_true", help="no made workloads, no timing, nothing kept")
    options = parser.parse_args()
    if not options.file.is_file():
        parser.error(f"--file: there is no {options.file}")
    tasks = read(options.file, options.half)
    orders = []
    for seed in range(options.seed, options.seed + options.orders):
        orders.append(tasks.copy())
        random.Random(seed).shuffle(orders[-1])
    figures: dict[str, float] = {}
    tables: dict[str, Any] = {}
    for kind, given in (("classes", orders), ("mixed", [[replace(t, service="all") for t in o] for o in orders])):
        print(kind, file=sys.stderr)
        tables[kind] = found = compare(given)
        for start, forecasters in found.items():
            text, before = forecasters["text"], forecasters["by_size"]
            for name in ("crps_log", "crps_tokens"):
                figures[f"{kind}_{start}_{name}_of_by_size"] = text[name] / before[name]
            figures[f"{kind}_{start}_log_score_gain"] = before["log_score"] - text["log_score"]
            off = max(abs(text[f"below_q{100 * q:.0f}"] - q) for q in QUANTILES)
            figures[f"{kind}_{start}_worst_quantile_points"] = 100 * off
    if not options.quick:
        rng = random.Random(options.seed)
        figures |= made("repeats", repeats(tasks, rng), 2000, 4000)
        figures |= made("templates", templates(options.file, rng), 500, 4000)
        double = doubling(orders[0][:8000])
        figures |= made("doubling", double, len(double) // 2, len(double) // 2 + 500)
        figures |= timing(options.file, orders[0])
    rounded = {
        kind: {
            start: {name: {k: round(v, 4) for k, v in row.items()} for name, row in rows.items()}
            for start, rows in t.items()
        }
        for kind, t in tables.items()
    }
    emit("lengths", figures, {}, keep=not options.quick, tables=rounded, orders=options.orders, half=options.half)


if __name__ == "__main__":
    main()
