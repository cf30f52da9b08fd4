"""`make bench-edge`: the edge engine against llama.cpp without it, with one model, in one run.

Peers, alternating with ours: the raw low-level decode loop (the ceiling: no requests, no text, no stopping, no
metering), llama-cpp-python's `Llama` one request after another, and xllamacpp (llama-server in process). Everyone gets
the same prompts, prefilled from nothing, and decodes greedily; a rate is output tokens over the time from the first
request handed in to the last token out, prompts included. The same per second of CPU time (`cpu_…`) says what a noisy
neighbour cannot disturb as much, and what energy goes by.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import structlog

from benchmarks.common import emit, median_and_spread
from perllm.broker.engine.contract import Generation, Stop
from perllm.broker.messages import TaskSpec
from perllm.broker.settings import load_settings
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.llama import Context
from perllm.edge_worker.settings import EdgeSettings

WIDTHS = (1, 2, 4, 8, 16)
TOKENS = 64
#: The plain `Llama` is measured at this width only: its rate does not depend on it.
SERIAL_WIDTH = 8
PEER_WIDTHS = (4, 8)
PROMPTS = (
    "Write a long story about a dragon.", "Explain how a computer works, in detail.",
    "Describe the history of Rome.", "Write an essay about the sea.", "Explain photosynthesis in detail.",
    "Tell me everything about cats.", "Write a long letter to a friend.", "Describe the solar system, by planet.",
    "Explain how bread is made, step by step.", "Write about the seasons of the year.",
    "Describe a journey through the mountains.", "Explain what a bank does, in detail.",
    "Tell the story of a lost dog.", "Describe how to build a house.", "Write a speech about friendship.",
    "Explain the rules of football.", "Describe a day in a big city.", "Write about music and why people like it.",
    "Explain how plants grow.", "Describe the life of a bee.",
)  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """Output tokens per second of time, and of CPU time of the whole process."""

    wall: float
    cpu: float


def rate(work: Callable[[], int]) -> Rate:
    """The rate of `work`, which says how many tokens came out."""
    began, cpu = time.perf_counter(), time.process_time()
    count = work()
    return Rate(count / (time.perf_counter() - began), count / (time.process_time() - cpu))


def generate(engine: LlamaEngine, prompts: list[str]) -> list[Generation]:
    """All prompts at once through the engine."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        jobs = [
            pool.submit(engine.generate, str(i), TaskSpec(prompt=p, max_tokens=TOKENS), Stop(600))
            for i, p in enumerate(prompts)
        ]
        return [job.result() for job in jobs]


def ours(engine: LlamaEngine, prompts: list[str]) -> Rate:
    """The engine, all prompts at once."""
    return rate(lambda: sum(done.completion_tokens for done in generate(engine, prompts)))


def raw(context: Context, prompts: list[list[int]], tokens: int = TOKENS) -> int:
    """Tokens of a bare loop over `llama_decode`: prompts in full batches, then everybody in one batch."""
    context.clear()
    latest = [0] * len(prompts)
    for sequence, prompt in enumerate(prompts):
        context.begin()
        row = context.add(sequence, 0, prompt, output=True)
        assert context.decode() == 0
        latest[sequence] = int(context.logits(row).argmax())
    for step in range(tokens - 1):
        context.begin()
        for sequence, prompt in enumerate(prompts):
            context.add(sequence, len(prompt) + step, [latest[sequence]], output=True)
        assert context.decode() == 0
        for row in range(len(prompts)):
            latest[row] = int(context.logits(row).argmax())
    return len(prompts) * tokens


class OneAtATime:
    """llama-cpp-python's `Llama`, the attention kernel it is fastest with."""

    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import Llama  # noqa: PLC0415

        self._llama = Llama(
            str(path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
        )

    def run(self, prompts: list[str]) -> int:
        """Tokens of all prompts, one after another."""
        count = 0
        for prompt in prompts:
            self._llama.reset()
            answer: Any = self._llama.create_chat_completion(
                [{"role": "user", "content": prompt}], temperature=0, max_tokens=TOKENS, repeat_penalty=1.0
            )
            count += answer["usage"]["completion_tokens"]
        return count

    def close(self) -> None:
        self._llama.close()


def xllamacpp(path: Path, threads: int, prompts: list[str]) -> Rate:
    """A llama-server in this process with a slot per prompt. It lives for this call only."""
    import xllamacpp as peer  # noqa: PLC0415

    params = peer.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = len(prompts), 1024 * len(prompts)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers, params.cache_ram_mib, params.verbosity = 0, 0, -1
    params.cache_prompt = False
    server = peer.Server(params)

    def go(prompt: str) -> int:
        answer = server.handle_chat_completions(
            {
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": TOKENS, "temperature": 0, "cache_prompt": False,
            }
        )  # fmt: skip
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        return int(answer["usage"]["completion_tokens"])

    go(prompts[0])
    with ThreadPoolExecutor(len(prompts)) as pool:
        return rate(lambda: sum(pool.map(go, prompts)))


def long_enough(engine: LlamaEngine) -> list[str]:
    """The prompts whose answers do not end before `TOKENS` tokens, so that everybody has the same to do."""
    return [p for p in PROMPTS if generate(engine, [p])[0].completion_tokens == TOKENS]


def throughput(engine: LlamaEngine, path: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    """Samples of each rate and ratio, by name."""
    samples: dict[str, list[float]] = defaultdict(list)
    prompts = long_enough(engine)
    prompts = (prompts * WIDTHS[-1])[: WIDTHS[-1]]
    (batch,) = engine._pool.batches
    loaded = engine._pool.get(None).loaded
    assert loaded is not None
    tokens = [loaded.prompter.tokens(TaskSpec(prompt=p)) for p in prompts]
    context = Context(batch.model, kv_tokens=batch.context.kv_tokens, sequences=WIDTHS[-1], batch=512, threads=threads)
    serial = OneAtATime(path, threads)
    for number in range(rounds):
        for width in WIDTHS:
            first = rate(lambda: raw(context, tokens[:width]))  # noqa: B023  called at once
            mine = ours(engine, prompts[:width])
            last = rate(lambda: raw(context, tokens[:width]))  # noqa: B023
            # before and after: the machine drifts
            ceiling = Rate((first.wall + last.wall) / 2, (first.cpu + last.cpu) / 2)
            samples[f"ours_{width}"].append(mine.wall)
            _compare(samples, "raw_loop", width, mine, ceiling)
            if width == SERIAL_WIDTH:
                alone = rate(lambda: serial.run(prompts[:width]))  # noqa: B023
                _compare(samples, "one_at_a_time", width, mine, alone)
                samples[f"raw_over_one_at_a_time_{width}"].append(ceiling.wall / alone.wall)
            if width in PEER_WIDTHS:
                _compare(samples, "xllamacpp", width, mine, xllamacpp(path, threads, prompts[:width]))
            print(
                f"round {number + 1}/{rounds}, width {width}: {mine.wall:.1f} tokens/s, raw loop {ceiling.wall:.1f}",
                flush=True,
            )
    context.close()
    serial.close()
    return samples


def _compare(samples: dict[str, list[float]], peer: str, width: int, mine: Rate, theirs: Rate) -> None:
    samples[f"{peer}_{width}"].append(theirs.wall)
    samples[f"over_{peer}_{width}"].append(mine.wall / theirs.wall)
    samples[f"cpu_over_{peer}_{width}"].append(mine.cpu / theirs.cpu)


def short_beside_long(engine: LlamaEngine) -> float:
    """Steps until a short request's first token, when it comes while a prompt of 2,000 tokens is prefilled."""
    stop, began = Stop(600), engine.counters()
    filler = "one two three four five six seven eight nine ten " * 199
    with ThreadPoolExecutor() as pool:
        long = pool.submit(engine.generate, "long", TaskSpec(prompt=filler, max_tokens=1), stop)
        _until(lambda: engine.counters().prefilled > began.prefilled)
        at = engine.counters()
        short = engine.generate("short", TaskSpec(prompt="Hi!", max_tokens=1), Stop(600))
        beside = engine.counters().active >= 1
        stop.cancel()
        long.result()
    assert beside, "the long prompt was done first: the measurement says nothing"
    return short.after.steps - at.steps


def cancel(engine: LlamaEngine, prompt: str) -> float:
    """Steps from asking a request to stop until it has left, another one beside it."""
    stop, others = Stop(600), Stop(600)
    began = engine.counters()
    with ThreadPoolExecutor() as pool:
        other = pool.submit(engine.generate, "other", TaskSpec(prompt="Count.", max_tokens=2000), others)
        job = pool.submit(engine.generate, "job", TaskSpec(prompt=prompt, max_tokens=1000), stop)
        _until(lambda: engine.counters().active == 2 and engine.counters().steps > began.steps + 3)
        at = engine.counters().steps
        stop.cancel()
        steps = job.result().after.steps - at
        others.cancel()
        other.result()
    return steps


def in_company(engine: LlamaEngine, prompts: list[str]) -> dict[str, float]:
    """How often greedy output in a batch of 8 is not the one alone: share of texts, and of tokens up to there."""
    alone = [generate(engine, [p])[0].output.text for p in prompts]
    groups = [list(range(i, min(i + 8, len(prompts)))) for i in range(0, len(prompts), 8)]
    together = [d.output.text for group in groups for d in generate(engine, [prompts[i] for i in group])]
    differ = [a != b for a, b in zip(alone, together, strict=True)]
    same = sum(len(_common(a, b)) for a, b in zip(alone, together, strict=True))
    return {
        "in_batch_texts_differ": sum(differ) / len(differ),
        "in_batch_tokens_differ": sum(differ) / max(1.0, same / 4.5),  # about 4.5 characters a token
    }


def memory(engine: LlamaEngine, requests: int) -> float:
    """MB of resident memory gained over so many requests, after a tenth of them to warm up."""
    process = psutil.Process()
    left = iter(range(requests))
    lock = threading.Lock()

    def go() -> None:
        while True:
            with lock:
                i = next(left, None)
            if i is None:
                return
            spec = TaskSpec(prompt=f"Say {i}.", max_tokens=1 + i % 2, temperature=i % 3 / 2, stop=("x",))
            engine.generate(str(i), spec, Stop(600))

    def run(count: int) -> None:
        nonlocal left
        left = iter(range(count))
        threads = [threading.Thread(target=go) for _ in range(engine.slots)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()

    run(requests // 10)
    before = process.memory_info().rss
    run(requests)
    return (process.memory_info().rss - before) / 1e6


def _common(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 120
    while not true():
        if time.monotonic() > give_up:
            raise TimeoutError("the engine did not get there")
        time.sleep(0.0005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of every engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000, help="over which memory is watched")
    parser.add_argument("--model", help="a GGUF file; default: the bundled model as Q8_0")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = load_settings(EdgeSettings, threads=arguments.threads, slots=WIDTHS[-1], model=arguments.model)

    engine = LlamaEngine(settings, cached_prompts=0)
    engine.start()
    served = engine._pool.get(None)
    samples = throughput(engine, served.gguf.path, arguments.threads, arguments.rounds)
    samples["short_behind_long_steps"] = [short_beside_long(engine) for _ in range(10)]
    long = "word " * 1500
    samples["cancel_steps"] = [cancel(engine, prompt) for prompt in ("Count to a thousand.", long) for _ in range(10)]
    company = in_company(engine, list(PROMPTS))
    splits = {n: len(served.tuning.widths.choose(n)) for n in WIDTHS} if served.tuning else {}
    engine.close()

    engine = LlamaEngine(settings)  # prefixes shared, as in service
    engine.start()
    gained = memory(engine, arguments.requests)
    engine.close()

    figures, spread = median_and_spread(samples)
    for cpu in ("", "cpu_"):
        figures[f"{cpu}over_raw_loop_min"] = min(figures[f"{cpu}over_raw_loop_{width}"] for width in WIDTHS)
    figures["cancel_steps"] = max(samples["cancel_steps"])
    figures["short_behind_long_steps"] = max(samples["short_behind_long_steps"])
    figures |= company
    figures[f"rss_mb_gained_over_{arguments.requests}"] = gained
    emit(
        "edge", figures, spread, model=served.name, threads=arguments.threads, tokens=TOKENS, rounds=arguments.rounds,
        decodes_per_step=splits, load=statistics.fmean(psutil.getloadavg()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
