"""`make bench-far_worker`: how many no-op tasks a worker does in a second when its server is a long way off.

One worker (the emulated engine without delay, results stored, task events on) behind `benchmarks.slow_link`; scheduler
and producer are near the server. For every round trip and number of slots: tasks/s from the first submission to the
last stored result, the worker's own CPU time per task, and the same of a plain Celery worker (threads, same
concurrency, events on) on the same link, in alternation.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.common import SCHEDULER, celery_worker, child, emit, median_and_spread
from benchmarks.slow_link import slow_link
from perllm import Client, State
from perllm.broker.connection import connect
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.settings import Settings

#: Round trips, ms; the proxy's own time comes on top, so what one takes in truth is measured, too.
ROUND_TRIPS = (0, 5, 30)
SLOTS = (16, 64)
#: Seconds of work a measurement should have, about, and tasks it has at most and at least.
SECONDS, MOST, LEAST = 8.0, 4000, 100
TASK = {"prompt": "Why is the sky blue?", "deadline": 3600, "max_tokens": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-trips", type=float, nargs="+", default=ROUND_TRIPS, help="ms")
    parser.add_argument("--slots", type=int, nargs="+", default=SLOTS)
    parser.add_argument("--no-peer", action="store_true", help="without plain Celery; not recorded")
    options = parser.parse_args()
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        os.environ.update(PERLLM_REDIS_URL=server.url, PERLLM_POLICY="least-loaded")
        bench = Bench(Path(folder), server.url)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for round_trip in options.round_trips:
                for slots in options.slots:
                    for name, value in bench.measure(round_trip, slots, peer=not options.no_peer).items():
                        key = f"{name}_{round_trip:g}ms_{slots}_slots"
                        samples.setdefault(key, []).append(value)
                        print(f"  {key}: {value:.4g}", file=sys.stderr)
    figures, spread = median_and_spread(samples)
    emit("far_worker", figures, spread, keep=not options.no_peer, rounds=options.rounds)


class Bench:
    """Measures one round trip and number of slots at a time."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.client = Client()
        self.server = connect(self.client.settings)

    def measure(self, round_trip: float, slots: int, *, peer: bool) -> dict[str, float]:
        with slow_link(self.url, _free_port(), round_trip / 1000, self.folder / "link.log") as there:
            expected = slots / (0.004 + 2.5 * round_trip / 1000)  # of plain Celery far less; it has less to do
            rate, cpu = self.ours(there, slots, _tasks(expected))
            figures = {"round_trip_ms": _round_trip(there) * 1000, "tasks_per_s": rate, "worker_cpu_ms": cpu * 1000}
            if peer:
                figures["celery_tasks_per_s"] = self.plain(there, slots, _tasks(1 / (0.002 + 2 * round_trip / 1000)))
            return figures

    def ours(self, there: str, slots: int, tasks: int) -> tuple[float, float]:
        """Tasks/s, and the worker's CPU time per task, s."""
        with self.scheduler(), self.worker("benchmarks.stamping_worker", there, slots) as worker:
            self.client.submit(**TASK).result(60)  # type: ignore[arg-type]  the first one opens everything
            cpu, began = _cpu(worker), time.perf_counter()
            self.client.submit_many([TASK] * tasks)
            while self.client.ledger.counts()[State.SUCCEEDED] <= tasks:
                time.sleep(0.02)
            took, cpu = time.perf_counter() - began, _cpu(worker) - cpu
        self.server.flushdb()
        return tasks / took, cpu / tasks

    def plain(self, there: str, slots: int, tasks: int) -> float:
        from benchmarks.plain_celery import stamp  # noqa: PLC0415  reads the URL just set

        with self.worker("benchmarks.plain_celery", there, slots):
            stamp.apply_async(("",)).get(timeout=60)
            began = time.perf_counter()
            keys = [f"celery-task-meta-{stamp.apply_async(('',)).id}" for _ in range(tasks)]
            while self.server.exists(*keys) < tasks:
                time.sleep(0.02)
            took = time.perf_counter() - began
        self.server.flushdb()
        return tasks / took

    @contextmanager
    def scheduler(self) -> Iterator[None]:
        with child(self.folder / "scheduler.log", SCHEDULER):
            yield

    @contextmanager
    def worker(self, app: str, there: str, slots: int) -> Iterator[psutil.Process]:
        settings = {
            "PERLLM_REDIS_URL": there,
            "PERLLM_SLOTS": str(slots),
            "PERLLM_NODE_NAME": "far",
            "PLAIN_EVENTS": "1",
        }
        with child(self.folder / "worker.log", celery_worker(app), **settings) as process:
            yield psutil.Process(process.pid)


def _round_trip(there: str) -> float:
    """What one takes in truth, s, median of 50."""
    with connect(Settings(redis_url=there)) as client:  # type: ignore[arg-type]
        return statistics.median(timeit.repeat(client.ping, number=1, repeat=50))


def _tasks(expected: float) -> int:
    return int(min(MOST, max(LEAST, expected * SECONDS)))


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
