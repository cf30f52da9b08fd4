"""`make soak`: a million no-op tasks through the whole system, and whether any process's memory grows meanwhile.

Finished tasks and the event stream are bounded by settings, as in any long run, so that what could grow is only what
leaks. Sampled: resident memory of the server, the scheduler and its standby, the worker and the producer (this
process), and the bytes the server itself counts. A process is flat when the straight line through its samples after
the warm-up rises by no more than `ALLOWED` of their median, or `ALLOWED_MB`, whichever is more. Exit status 1 when one
is not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil

from benchmarks.common import SCHEDULER, child, emit
from perllm import Client, State
from perllm.broker.connection import connect
from perllm.broker.local.server import EmbeddedServer

TASKS = 1_000_000
SLOTS = 8
TASK = {"prompt": "Why is the sky blue?", "deadline": 3600, "max_tokens": 1}
#: Tasks waiting in the ledger that the producer keeps up.
BACKLOG = 2_000
BATCH = 500
#: What the ledger keeps: finished tasks of each state, and events.
BOUNDS = {"PERLLM_RETENTION_TASKS": "5000", "PERLLM_STREAM_LENGTH": "20000"}
#: Samples per run, and the share of them that is warm-up.
SAMPLES, WARM_UP = 200, 0.3
ALLOWED, ALLOWED_MB = 0.05, 4.0
#: Seconds without a task done after which the run is given up.
STALL = 120.0
MB = 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=TASKS, help="fewer are not recorded (default %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server, ExitStack() as stack:
        assert server.pid is not None
        os.environ.update(PERLLM_REDIS_URL=server.url, PERLLM_ENGINE="emulated", PERLLM_SLOTS=str(SLOTS), **BOUNDS)
        logs = Path(folder)
        worker = [sys.executable, "-m", "celery", "-A", "perllm.edge_worker", "worker", "-n", "soak@soak"]
        pids = {"server": server.pid, "producer": os.getpid()}
        pids["scheduler"] = stack.enter_context(child(logs / "scheduler.log", SCHEDULER)).pid
        pids["standby"] = stack.enter_context(child(logs / "standby.log", SCHEDULER)).pid
        pids["worker"] = stack.enter_context(child(logs / "worker.log", worker, PERLLM_NODE_NAME="soak")).pid
        client = stack.enter_context(Client())
        client.submit("a first task opens everything", deadline=600).result(120)
        began = time.monotonic()
        samples = soak(client, pids, options.tasks)
        took = time.monotonic() - began
    done = np.array([d for d, _ in samples])
    verdicts = {name: verdict(done, np.array([s[name] for _, s in samples])) for name in samples[0][1]}
    flat = all(v["flat"] for v in verdicts.values())
    figures = {"flat": flat, "tasks": int(done[-1]), "tasks_per_s": options.tasks / took}
    rule = {"warm_up": WARM_UP, "allowed_share": ALLOWED, "allowed_mb": ALLOWED_MB}
    emit("soak", figures, {}, keep=options.tasks >= TASKS, memory=verdicts, rule=rule, bounds=BOUNDS)
    return 0 if flat else 1


def soak(client: Client, pids: Mapping[str, int], tasks: int) -> list[tuple[int, dict[str, float]]]:
    """Run so many tasks. Returns samples: tasks done, and MB per process."""
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    ledger, server = client.ledger, connect(client.settings)
    first = ledger.totals().get("succeeded", 0)
    submitted = done = 0
    samples: list[tuple[int, dict[str, float]]] = []
    moved = time.monotonic()
    while done < tasks:
        if submitted < tasks and ledger.counts()[State.PENDING] < BACKLOG:
            size = min(BATCH, tasks - submitted)
            client.submit_many(
                {"prompt": "Why is the sky blue?", "deadline": 3600, "max_tokens": 1} for _ in range(size)
            )
            submitted += size
        else:
            time.sleep(0.02)
        now = ledger.totals().get("succeeded", 0) - first
        if now > done:
            done, moved = now, time.monotonic()
        elif time.monotonic() - moved > STALL:
            sys.exit(f"error: {done} of {tasks} tasks were done, and for {STALL:g} s no more")
        if done >= len(samples) * tasks / SAMPLES:
            rss = {name: p.memory_info().rss / MB for name, p in processes.items()}
            used = float(server.info("memory")["used_memory"]) / MB
            samples.append((done, rss | {"server's own count": used}))
            show(done, tasks, rss)
    return samples


def verdict(done: np.ndarray, mb: np.ndarray) -> dict[str, float | bool]:
    """Whether one process's memory is flat after the warm-up, and what was seen of it."""
    warm = done >= WARM_UP * done[-1]
    x, y = done[warm] / 1e6, mb[warm]
    slope = float(np.polyfit(x, y, 1)[0])
    grown, median = slope * float(x[-1] - x[0]), float(np.median(y))
    return {
        "flat": grown <= max(ALLOWED * median, ALLOWED_MB),
        "first_mb": round(float(mb[0]), 1),
        "warm_mb": round(float(y[0]), 1),
        "last_mb": round(float(y[-1]), 1),
        "grown_mb": round(grown, 2),
        "mb_per_million_tasks": round(slope, 2),
    }


def show(done: int, tasks: int, rss: Mapping[str, float]) -> None:
    memory = ", ".join(f"{name} {mb:.0f}" for name, mb in rss.items())
    terminal = sys.stderr.isatty()
    line = f"{done:,} of {tasks:,} tasks; MB: {memory}"
    print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
