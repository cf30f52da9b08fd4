"""`make bench-cloud`: the full path (ledger, scheduler, Celery, vLLM in the worker) against vLLM used directly.

Both engines are on the same GPU with the same arguments, one idle while the other works, alternating, medians over the
rounds. At each level so many producers keep one task in flight each.

- `over_vllm_LEVEL`, `over_vllm_min`: output tokens/s over those of `AsyncLLM.generate`, called directly for the same
  prompts with final outputs only (its cheapest way);
- `added_p50_ms_LEVEL`, `added_p50_ms` (the worst): from the producer's call of `submit` to its result, less the time
  in the engine (waiting, prefill, decode) by the receipt;
- `energy_sum_error`: the receipts' joules of a run of 20 s and more against the GPU's own counter over it;
- `abort_s` (the worst of `abort_tasks`, ten unless some ended before): from a cancel to the end of the Celery task, 64
  others running;
- `kill_*`: the engine's process killed by SIGKILL under 64 tasks, of which `kill_running` had not ended by then.

`--cpu` tries all of it on a CPU build of vLLM with a tiny model and emulated joules, and keeps no result.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import random
import statistics
import string
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import SCHEDULER, celery_worker, child, emit, machine, median_and_spread, versions
from benchmarks.random_llama import SIZES, write_model
from perllm.broker.client import AsyncClient, Client
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Completed, Result, State, TaskSpec
from perllm.broker.queues.app import make_app
from perllm.broker.settings import load_settings
from perllm.cloud_worker.nvml import NVMLDevice, no_gpu, visible_gpus
from perllm.cloud_worker.settings import CloudSettings
from perllm.cloud_worker.vllm_engine import quiet_environment

#: Tasks of one round at a level: so many for each producer, at least `LEAST`.
EACH, LEAST = 3, 8
CONTEXT = 2048
#: Seconds the worker may take to load its model, and a run to end.
PATIENCE = 600.0
#: Seconds of the run whose joules are summed: the counter is behind by up to 0.1 s at either end.
METERED = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="8b")
    parser.add_argument("--levels", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens")
    parser.add_argument("--crowd", type=int, default=64, help="tasks at once for energy, abort and kill")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON, for both engines")
    parser.add_argument("--cpu", action="store_true", help="try it on a CPU build of vLLM; keeps no result")
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("error: vLLM is not installed: pip install 'perllm[cloud]'")
    if not options.cpu and (missing := no_gpu()):
        raise SystemExit(f"error: {missing}")
    with tempfile.TemporaryDirectory(prefix="perllm-cloud-") as folder, EmbeddedServer(Path(folder)) as server:
        configure(options, Path(folder), server.url)
        with processes(options, Path(folder)) as worker:
            bench = Bench(options, worker)
            bench.run()
    print(f"machine: {bench.gpu}", file=sys.stderr)
    if options.cpu:
        result = {"bench": "cloud (trial on a CPU, proves nothing)", "figures": bench.figures, "spread": bench.spread}
        print(json.dumps(result | {"machine": machine(), "versions": versions()}), flush=True)
    else:
        emit("cloud", bench.figures, bench.spread, gpu=bench.gpu, model=bench.model, detail=bench.detail)


def configure(options: argparse.Namespace, folder: Path, url: str) -> None:
    """The settings of every process, this one's peer engine included."""
    half = {"gpu_memory_utilization": 0.42} if not options.cpu else {"enforce_eager": True}
    graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}} if not options.cpu else {}
    given = {"load_format": "dummy", "dtype": "bfloat16", "seed": 0, **half, **graphs, **options.vllm_args}
    os.environ.update(
        PERLLM_REDIS_URL=url,
        PERLLM_DATA_DIR=str(folder),
        PERLLM_ENGINE="vllm",
        PERLLM_MODEL=str(write_model(folder / f"llama-{options.size}", options.size)),
        PERLLM_SLOTS=str(max(*options.levels, options.crowd)),
        PERLLM_CONTEXT=str(CONTEXT),
        PERLLM_NODE_NAME="gpu",
        PERLLM_LEADER_TTL="30",  # there is no other scheduler to take over
        PERLLM_VLLM_ARGS=json.dumps(given),
    )
    if options.cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@contextmanager
def processes(options: argparse.Namespace, folder: Path) -> Iterator[int]:
    """A scheduler and a worker, once the worker is in service. Gives the worker's process id."""
    app = "benchmarks.cpu_vllm" if options.cpu else "perllm.cloud_worker"
    try:
        with (
            child(folder / "scheduler.log", SCHEDULER) as scheduler,
            child(folder / "worker.log", celery_worker(app)) as worker,
        ):
            with Client() as client:
                give_up = time.monotonic() + PATIENCE
                while not client.ledger.nodes():
                    if worker.poll() is not None or scheduler.poll() is not None or time.monotonic() > give_up:
                        raise SystemExit((folder / "worker.log").read_text() + (folder / "scheduler.log").read_text())
                    time.sleep(0.5)
            yield worker.pid
    finally:
        log = (folder / "worker.log").read_text(errors="replace").splitlines()
        print("\n".join(["--- the end of the worker's log", *log[-30:]]), file=sys.stderr)


class Peer:
    """vLLM used directly, in this process."""

    def __init__(self, settings: CloudSettings) -> None:
        quiet_environment()
        from perllm.cloud_worker import vllm_api  # noqa: PLC0415  takes seconds

        self._api = vllm_api
        self._settings, self._args = settings, vllm_api.engine_args(settings, settings.slots or 1)
        self._count = 0

    async def open(self) -> None:
        self._llm = self._api.open_engine(self._args, lambda *_: None)
        self._prompter = self._api.Prompter(self._llm, self._settings)

    async def generate(self, prompt: str, tokens: int) -> int:
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        self._count += 1
        rendered = self._prompter.prompt(TaskSpec(prompt=prompt))
        params = self._api.sampling_params(TaskSpec(prompt=prompt), tokens, rendered)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        ids = self._api.tokens_input(rendered.tokens)
        async for output in self._llm.generate(ids, params, f"peer.{self._count}"):
            return len(output.outputs[0].token_ids)
        raise AssertionError("no output")

    def close(self) -> None:
        self._llm.shutdown()


class Bench:
    """All of it, in order. `figures` and `spread` are complete when `run` returns."""

    def __init__(self, options: argparse.Namespace, worker: int) -> None:
        self.options, self._worker = options, worker
        self.model = f"llama {options.size} bf16, random weights, {options.prompt} + {options.tokens} tokens"
        self.settings = load_settings(CloudSettings)
        self.gpu = "none" if options.cpu else f"{len(visible_gpus())} × {NVMLDevice(visible_gpus()[0]).name}"
        self._counter = None if options.cpu else NVMLDevice(visible_gpus()[0])
        self.figures: dict[str, Any] = {}
        self.spread: dict[str, Any] = {}
        self.detail: dict[str, Any] = {}
        self._random = random.Random(0)

    def run(self) -> None:
        asyncio.run(self._throughput())
        self._say("energy")
        asyncio.run(self._energy())
        self._say("abort")
        self._abort()
        self._say("kill")
        self._kill()

    @staticmethod
    def _say(what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)

    def _prompts(self, count: int) -> list[str]:
        """Of so many tokens each (one per byte), none like another."""
        return ["".join(self._random.choices(string.ascii_lowercase, k=self.options.prompt)) for _ in range(count)]

    # --- throughput and added latency

    async def _throughput(self) -> None:
        self._say("peer engine")
        peer = Peer(self.settings)
        await peer.open()
        samples: dict[str, list[float]] = {}
        async with AsyncClient(settings=self.settings) as client:
            for level in self.options.levels:  # kernels and caches of either are warm before anything counts
                await self._direct(peer, level, level)
                await self._through(client, level, level)
            for number in range(self.options.rounds):
                for level in self.options.levels:
                    self._say(f"round {number + 1}, {level} at once")
                    count = max(LEAST, EACH * level)
                    direct = await self._direct(peer, level, count)
                    ours, added = await self._through(client, level, count)
                    for name, value in (
                        (f"vllm_tok_s_{level}", direct),
                        (f"tok_s_{level}", ours),
                        (f"over_vllm_{level}", ours / direct),
                        (f"added_p50_ms_{level}", 1e3 * statistics.median(added)),
                    ):
                        samples.setdefault(name, []).append(value)
        peer.close()
        self.figures, self.spread = median_and_spread(samples)
        self.figures["over_vllm_min"] = min(self.figures[f"over_vllm_{n}"] for n in self.options.levels)
        self.figures["added_p50_ms"] = max(self.figures[f"added_p50_ms_{n}"] for n in self.options.levels)

    async def _direct(self, peer: Peer, level: int, count: int) -> float:
        """Output tokens/s of the peer."""
        prompts = self._prompts(count)
        tokens = 0

        async def producer() -> None:
            nonlocal tokens
            while prompts:
                tokens += await peer.generate(prompts.pop(), self.options.tokens)

        began = time.perf_counter()
        await asyncio.gather(*(producer() for _ in range(level)))
        return tokens / (time.perf_counter() - began)

    async def _through(self, client: AsyncClient, level: int, count: int) -> tuple[float, list[float]]:
        """Output tokens/s of the full path, and what it added to each task, s."""
        began = time.perf_counter()
        done = await self._produce(client, level, count)
        seconds = time.perf_counter() - began
        added = [wall - engine_seconds(result) for wall, result in done]
        return sum(completion_tokens(result) for _, result in done) / seconds, added

    async def _produce(self, client: AsyncClient, level: int, count: int) -> list[tuple[float, Result]]:
        """`count` tasks, `level` at a time: (seconds the producer waited, result) each."""
        prompts, done = self._prompts(count), []

        async def producer() -> None:
            while prompts:
                began = time.perf_counter()
                task = await client.submit(prompts.pop(), max_tokens=self.options.tokens, deadline=PATIENCE)
                result = await task.result(PATIENCE)
                if result.state != "succeeded":
                    raise SystemExit(f"a task {result.state}: {result.reason}")
                done.append((time.perf_counter() - began, result))

        await asyncio.gather(*(producer() for _ in range(level)))
        return done

    # --- energy

    async def _energy(self) -> None:
        rate = self.figures.get(f"tok_s_{self.options.crowd}") or max(
            self.figures[f"tok_s_{n}"] for n in self.options.levels
        )
        count = self.options.crowd + int((1.0 if self.options.cpu else METERED) * rate / self.options.tokens)
        async with AsyncClient(settings=self.settings) as client:
            began, before = time.monotonic(), self._joules()
            done = await self._produce(client, self.options.crowd, count)
            joules, seconds = self._joules() - before, time.monotonic() - began
        receipts = [result.receipt.energy for _, result in done if result.receipt]
        shares = sum(energy.inference + energy.idle for energy in receipts)
        self.detail["energy"] = {
            "seconds": round(seconds, 1),
            "tasks": count,
            "receipts_j": round(shares, 1),
            "counter_j": round(joules, 1),
            "idle_part": round(sum(energy.idle for energy in receipts) / max(shares, 1e-9), 3),
            "method": receipts[0].method,
        }
        self.figures["energy_sum_error"] = abs(shares - joules) / joules if joules else None

    def _joules(self) -> float:
        return self._counter.energy() if self._counter else 0.0

    # --- abort

    def _abort(self) -> None:
        stopped: dict[str, float] = {}
        app = make_app(self.settings)
        ready = threading.Event()

        def listen() -> None:
            with app.connection_for_read() as connection:
                receiver = app.events.Receiver(
                    connection, handlers={"task-succeeded": lambda e: stopped.setdefault(e["uuid"], e["timestamp"])}
                )
                receiver.on_consume_ready = lambda *_, **__: ready.set()
                receiver.capture(limit=None, timeout=PATIENCE, wakeup=False)

        threading.Thread(target=listen, daemon=True).start()
        ready.wait(30)
        took = []
        with Client(settings=self.settings) as client:
            tasks = client.submit_many(self._long_tasks())
            wait_until(lambda: not self._waiting(client), "all were claimed", pause=0.01)
            for task in tasks[:10]:
                time.sleep(self._random.uniform(0.05, 0.15))
                if task.id in stopped:  # it ended by itself
                    continue
                began = time.time()
                task.cancel()
                wait_until(lambda task=task: task.id in stopped, "it was stopped", pause=0.01)
                took.append(stopped[task.id] - began)
            for task in tasks[10:]:
                task.cancel()
            wait_until(lambda: self._running(client) == 0, "nothing runs")
        if took:
            self.figures["abort_s"] = max(took)
            self.spread["abort_s"] = [min(took), max(took)]
        self.figures["abort_tasks"] = len(took)

    def _long_tasks(self) -> list[TaskSpec]:
        """A crowd of them, as long as they can be."""
        tokens = CONTEXT - self.options.prompt
        return [TaskSpec(prompt=p, max_tokens=tokens, deadline=PATIENCE) for p in self._prompts(self.options.crowd)]

    @staticmethod
    def _waiting(client: Client) -> int:
        """Tasks not claimed yet."""
        counts = client.ledger.counts()
        return counts[State.PENDING] + counts[State.DISPATCHED]

    @staticmethod
    def _running(client: Client) -> int:
        """Tasks claimed and not ended."""
        return client.ledger.counts()[State.RUNNING]

    # --- kill

    def _kill(self) -> None:
        with Client(settings=self.settings) as client:
            last_event = client.ledger.first_and_last_event()[1]
            tasks = client.submit_many(self._long_tasks())
            wait_until(lambda: not self._waiting(client), "all were claimed", pause=0.01)
            (engine,) = [
                child
                for child in psutil.Process(self._worker).children(recursive=True)
                if child.name().startswith("VLLM::Eng")
            ]
            running = self._running(client)
            engine.kill()
            killed = time.monotonic()
            wait_until(lambda: self._running(client) == 0, "all were handed back", pause=0.005)
            back = time.monotonic() - killed
            results = list(client.wait([task.id for task in tasks], PATIENCE))
            recovered = time.monotonic() - killed
            completed = Counter(
                event.id
                for _, event in client.ledger.events(last_event, count=1_000_000)
                if isinstance(event, Completed)
            )
        states = Counter(str(result.state) for result in results)
        self.figures |= {
            "kill_tasks": len(tasks),
            "kill_running": running,
            "kill_lost": len(tasks) - states["succeeded"],
            "kill_doubled": sum(1 for task in tasks if completed[task.id] > 1),
            "kill_handed_back_s": back,
            "kill_recovered_s": recovered,
        }
        self.detail["kill"] = {"states": dict(states), "attempts": dict(Counter(attempt(r) for r in results))}


def engine_seconds(result: Result) -> float:
    """Seconds a task spent inside the engine."""
    assert result.receipt is not None
    return result.receipt.wait + result.receipt.prefill + result.receipt.decode


def completion_tokens(result: Result) -> int:
    assert result.receipt is not None
    return result.receipt.completion_tokens


def attempt(result: Result) -> int:
    return result.receipt.attempt if result.receipt else 0


def wait_until(look: Any, what: str, pause: float = 0.05) -> None:
    """Wait until `look()` is true. Ends the benchmark when it never is."""
    give_up = time.monotonic() + PATIENCE
    while not look():
        if time.monotonic() > give_up:
            raise SystemExit(f"never happened: {what}")
        time.sleep(pause)


if __name__ == "__main__":
    main()
