"""`make bench-answers`: four answers to one prompt by the edge engine, in one task, against one answer and four tasks.

What a step costs grows with the sequences in it, so four answers cannot take as long as one alone where decoding gains
nothing from a batch. Three comparisons, alternating in one run, all of the same prompt sizes and exactly as many tokens
per answer (no token may end a text), at temperature 1:

- `over_one_in_company`: against one answer of a request beside three others that decode all the while. Every step then
  costs the same, so this is what the task of four pays beyond its batch: the aim is 1.3 at most.
- `over_one_alone`: against one request with nothing else in the batch.
- `over_four_tasks`: against four tasks at once, of prompts that share nothing; `over_four_alike` of the same prompt,
  which the engine's prefix cache shares among them.

`cpu_…` is the same in CPU time of the whole process, which a noisy neighbour does not disturb as much.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import structlog

from benchmarks.common import emit, median_and_spread
from perllm.broker.engine.contract import Generation, Stop
from perllm.broker.messages import TaskSpec
from perllm.broker.settings import load_settings
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.settings import EdgeSettings

ANSWERS = 4
#: Tokens of a prompt, about, and of an answer.
SIZES = ((32, 64), (400, 64))
WORDS = ("sun", "tree", "river", "stone", "cloud", "bird", "house", "road", "night", "light", "water", "wind")


class Took(NamedTuple):
    """What something took, s: time, and CPU time of the whole process."""

    wall: float
    cpu: float


class Bench:
    """The engine, and what is done with it."""

    def __init__(self, engine: LlamaEngine, tokens: int) -> None:
        (batch,) = engine._pool.batches
        model = batch.model
        self._engine = engine
        self._seeds = itertools.count(1)
        never_ends = {token: -100.0 for token in range(model.vocab_size) if model.ends(token)}
        self._options = {"temperature": 1.0, "max_tokens": tokens, "logit_bias": never_ends}

    def spec(self, prompt: int, *, n: int = 1, like: TaskSpec | None = None, **more: object) -> TaskSpec:
        """A task with a prompt of so many words, another each time unless it is `like` one."""
        text = like.prompt if like is not None else " ".join(random.choices(WORDS, k=prompt))
        options = {**self._options, "n": n, "seed": next(self._seeds), **more}
        return TaskSpec.model_validate({"prompt": text, **options})

    def time(self, specs: Sequence[TaskSpec]) -> Took:
        """Until all are done, handed in at once."""
        with ThreadPoolExecutor(len(specs)) as pool:
            began, cpu = time.perf_counter(), time.process_time()
            jobs = [pool.submit(self._engine.generate, str(i), spec, Stop(600)) for i, spec in enumerate(specs)]
            done: list[Generation] = [job.result() for job in jobs]
            took = Took(time.perf_counter() - began, time.process_time() - cpu)
        assert all(c.tokens == s.max_tokens for d, s in zip(done, specs, strict=True) for c in d.output.choices)
        return took

    @contextmanager
    def company(self, prompt: int, others: int) -> Iterator[None]:
        """So many others decode meanwhile."""
        stop = Stop(600)
        with ThreadPoolExecutor(others) as pool:
            for i in range(others):
                pool.submit(self._engine.generate, f"other{i}", self.spec(prompt, max_tokens=3000), stop)
            while sum(tokens > 0 for tokens in self._engine.progress().values()) < others:
                time.sleep(0.001)
            yield
            stop.cancel()


def measure(bench: Bench, prompt: int, rounds: int) -> dict[str, list[float]]:
    """Samples of each time and ratio, by name."""
    samples: dict[str, list[float]] = defaultdict(list)

    def in_company() -> Took:
        with bench.company(32, ANSWERS - 1):
            return bench.time([bench.spec(prompt)])

    def alike() -> Took:
        first = bench.spec(prompt)
        return bench.time([bench.spec(prompt, like=first) for _ in range(ANSWERS)])

    peers: dict[str, Callable[[], Took]] = {
        "one_alone": lambda: bench.time([bench.spec(prompt)]),
        "one_in_company": in_company,
        "four_tasks": lambda: bench.time([bench.spec(prompt) for _ in range(ANSWERS)]),
        "four_alike": alike,
    }
    for number in range(rounds):
        for name, peer in peers.items():
            before = bench.time([bench.spec(prompt, n=ANSWERS)])
            theirs = peer()
            after = bench.time([bench.spec(prompt, n=ANSWERS)])  # before and after: the machine drifts
            samples["four_answers"].append((before.wall + after.wall) / 2)
            samples[name].append(theirs.wall)
            samples[f"over_{name}"].append((before.wall + after.wall) / 2 / theirs.wall)
            samples[f"cpu_over_{name}"].append((before.cpu + after.cpu) / 2 / theirs.cpu)
        ratios = {name: [round(samples[f"{cpu}over_{name}"][-1], 2) for cpu in ("", "cpu_")] for name in peers}
        print(f"prompt of {prompt}, round {number + 1}/{rounds}: {ratios}", flush=True)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a GGUF file; default: the bundled model as Q8_0")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = load_settings(EdgeSettings, threads=arguments.threads, slots=8, model=arguments.model)
    engine = LlamaEngine(settings)
    engine.start()
    served = engine._pool.get(None)
    samples: dict[str, list[float]] = {}
    for prompt, tokens in SIZES:
        found = measure(Bench(engine, tokens), prompt, arguments.rounds)
        samples |= {f"{name}_{prompt}": values for name, values in found.items()}
    split = served.tuning.widths.choose(ANSWERS) if served.tuning else ()
    engine.close()
    figures, spread = median_and_spread(samples)
    for cpu in ("", "cpu_"):
        of_sizes = [figures[f"{cpu}over_one_in_company_{prompt}"] for prompt, _ in SIZES]
        figures[f"{cpu}over_one_in_company"] = max(of_sizes)
    emit(
        "answers", figures, spread, model=served.name, threads=arguments.threads, rounds=arguments.rounds,
        answers=ANSWERS, sizes=SIZES, decodes_per_step=len(split), load=statistics.fmean(psutil.getloadavg()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
