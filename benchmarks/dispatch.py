"""`make bench-dispatch`: what the ledger and the scheduler cost over plain Celery, on one server, in one run.

Three comparisons, ours and Celery's alternating, medians over the rounds:

- submission: `Client.submit_many` and `Client.submit` against `apply_async`, tasks/s;
- end to end: no-op tasks/s from the first submission to the last stored result, ours through the scheduler. Both
  workers: one process, threads pool, the same concurrency, results stored, task events on; plain Celery also with
  events off;
- latency on an idle system: submission to the engine's (the task's) first instruction, ours less plain Celery's, ms.

And what a task costs the machine: CPU time of the scheduler (policy `cs-ucb`), of the workers and of the server, per
no-op task over `NODES` nodes, ms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from benchmarks.common import SCHEDULER, celery_worker, child, emit, median_and_spread
from perllm import Client, State
from perllm.broker.connection import connect
from perllm.broker.local.server import EmbeddedServer

SLOTS = 8
#: Nodes the CPU time of a task is measured over.
NODES = 5
PROMPT = "Why is the sky blue? Answer in one short sentence."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=2000, help="tasks per end-to-end round")
    parser.add_argument("--cpu-tasks", type=int, default=10_000, help="tasks over which CPU time is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        os.environ.update(PERLLM_REDIS_URL=server.url, PERLLM_SLOTS=str(SLOTS), PERLLM_POLICY="least-loaded")
        from benchmarks.plain_celery import stamp  # noqa: PLC0415  reads the URL just set

        bench = Bench(Path(folder), stamp, options.tasks)
        samples: dict[str, list[float]] = {}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name, value in bench.round().items():
                samples.setdefault(name, []).append(value)
        assert server.pid is not None
        print("CPU time", file=sys.stderr)
        cpu = bench.cpu(server.pid, options.cpu_tasks)
    figures, spread = median_and_spread(samples)
    emit(
        "dispatch",
        figures | cpu,
        spread,
        rounds=options.rounds,
        slots=SLOTS,
        tasks=options.tasks,
        cpu_tasks=options.cpu_tasks,
        nodes=NODES,
    )


class Bench:
    """One round measures every figure once."""

    def __init__(self, folder: Path, stamp: object, tasks: int) -> None:
        self.folder, self.stamp, self.tasks = folder, stamp, tasks
        self.client = Client()
        self.server = connect(self.client.settings)

    def round(self) -> dict[str, float]:
        figures = self.submission()
        ours, plain, bare = (
            self.end_to_end_ours(),
            self.end_to_end_plain(events=True),
            self.end_to_end_plain(events=False),
        )
        figures |= {
            "end_to_end_per_s": ours,
            "celery_end_to_end_per_s": plain,
            "end_to_end_over_celery": ours / plain,
            "end_to_end_over_celery_without_events": ours / bare,
        }
        return figures | self.latency()

    def submission(self) -> dict[str, float]:
        """Nobody consumes meanwhile; what was submitted is cleared."""
        task = {"prompt": PROMPT, "deadline": 600}
        began = time.perf_counter()
        for _ in range(2000):
            self.stamp.apply_async((PROMPT,))  # type: ignore[attr-defined]
        celery = 2000 / (time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(2000):
            self.client.submit(PROMPT, deadline=600)
        one = 2000 / (time.perf_counter() - began)
        began = time.perf_counter()
        self.client.submit_many([task] * 20_000)
        many = 20_000 / (time.perf_counter() - began)
        self.server.flushdb()
        return {
            "apply_async_per_s": celery,
            "submit_per_s": one,
            "submit_many_per_s": many,
            "submit_over_apply_async": one / celery,
            "submit_many_over_apply_async": many / celery,
        }

    def end_to_end_ours(self) -> float:
        with self.scheduler(), self.node():
            began = time.perf_counter()
            self.client.submit_many([{"prompt": PROMPT, "deadline": 600}] * self.tasks)
            while self.client.ledger.counts()[State.SUCCEEDED] <= self.tasks:
                time.sleep(0.02)
            took = time.perf_counter() - began
        self.server.flushdb()
        return self.tasks / took

    def end_to_end_plain(self, *, events: bool) -> float:
        with self.plain_worker(events=events):
            began = time.perf_counter()
            keys = [f"celery-task-meta-{self.stamp.apply_async((PROMPT,)).id}" for _ in range(self.tasks)]  # type: ignore[attr-defined]
            while self.server.exists(*keys) < self.tasks:
                time.sleep(0.02)
            took = time.perf_counter() - began
        self.server.flushdb()
        return self.tasks / took

    def cpu(self, server: int, tasks: int) -> dict[str, float]:
        """CPU time per task, ms, once everything has been opened and compiled."""
        with ExitStack() as stack:
            scheduler = stack.enter_context(self.scheduler(PERLLM_POLICY="cs-ucb"))
            workers = [stack.enter_context(self.node(f"bench-{i}")) for i in range(NODES)]
            processes = {
                "scheduler": [psutil.Process(scheduler.pid)],
                "worker": [psutil.Process(w.pid) for w in workers],
                "server": [psutil.Process(server)],
            }
            self._run(50 * NODES)
            before = {name: _cpu_seconds(some) for name, some in processes.items()}
            self._run(tasks)
            spent = {name: _cpu_seconds(some) - before[name] for name, some in processes.items()}
        self.server.flushdb()
        return {f"cpu_ms_per_task_{name}": 1000 * seconds / tasks for name, seconds in spent.items()}

    def _run(self, tasks: int) -> None:
        """Submit so many tasks and wait until all are done."""
        done = self.client.ledger.counts()[State.SUCCEEDED] + tasks
        self.client.submit_many([{"prompt": PROMPT, "deadline": 600}] * tasks)
        while self.client.ledger.counts()[State.SUCCEEDED] < done:
            time.sleep(0.02)

    def latency(self, pairs: int = 200) -> dict[str, float]:
        ours, plain = [], []
        with self.scheduler(), self.node(), self.plain_worker(events=True):
            for number in range(pairs + 20):
                began = time.monotonic_ns()
                mine = int(self.client.submit(PROMPT, deadline=60).result(30).text) - began
                began = time.monotonic_ns()
                theirs = int(self.stamp.apply_async((PROMPT,)).get(timeout=30)) - began  # type: ignore[attr-defined]
                if number >= 20:  # the first ones open connections
                    ours.append(mine / 1e6)
                    plain.append(theirs / 1e6)
        self.server.flushdb()
        p50, p99 = statistics.median, lambda xs: statistics.quantiles(xs, n=100)[98]
        return {
            "p50_ms": p50(ours),
            "p99_ms": p99(ours),
            "celery_p50_ms": p50(plain),
            "celery_p99_ms": p99(plain),
            "added_p50_ms": p50(ours) - p50(plain),
            "added_p99_ms": p99(ours) - p99(plain),
        }

    @contextmanager
    def scheduler(self, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        with child(self.folder / "scheduler.log", SCHEDULER, **environment) as process:
            yield process

    @contextmanager
    def node(self, name: str = "bench") -> Iterator[subprocess.Popen[bytes]]:
        command = celery_worker("benchmarks.stamping_worker", name)
        with child(self.folder / f"{name}.log", command, PERLLM_NODE_NAME=name) as process:
            self.client.submit(PROMPT, deadline=60).result(60)  # as the plain worker's: one task opens everything
            yield process

    @contextmanager
    def plain_worker(self, *, events: bool) -> Iterator[None]:
        with child(self.folder / "plain.log", celery_worker("benchmarks.plain_celery"), PLAIN_EVENTS=str(int(events))):
            self.stamp.apply_async((PROMPT,)).get(timeout=60)  # type: ignore[attr-defined]
            yield


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """CPU time they have used so far, s."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


if __name__ == "__main__":
    main()
