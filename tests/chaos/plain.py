"""The peer: the same blows on plain Celery over the same server, with early and with late acknowledgement.

This module is the app of its workers (`celery -A chaos.plain worker`), its producers (`python -m chaos.plain NAME
FOLDER SEED`), and `run`. A task takes as long as it would on the replaying node of the worker's name; what it does is
to append its key to a file, which no server's end can undo. Everything is as Celery ships it, but for a visibility
timeout short enough to see what it brings back.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES
from support.cluster import Cluster, Process
from support.raw import redis_of

from chaos.checker import WINDOW
from chaos.perllm import PRODUCERS, REPLAYS
from chaos.plan import Blow
from chaos.producer import BACKLOG, BATCH, LENGTHS, read_records
from chaos.server import FragileServer
from chaos.world import Post, Show, World
from perllm.broker.settings import load_settings
from perllm.broker.worker.settings import WorkerSettings
from perllm.scheduler.simulator.step_table import load_table

QUEUE = "plain"
#: Seconds after which Celery delivers again what nobody acknowledged: beyond any task here (its default is an hour).
VISIBILITY = 15.0
#: Seconds without any change after which what is unfinished is stuck.
SETTLE = 4 * VISIBILITY
_DONE = "done"


def make_app() -> Celery:
    url = load_settings().celery_url
    assert "broker" not in TRANSPORT_ALIASES["redis"], "the peer is to run on kombu's own transport"
    made = Celery("plain", broker=url)
    made.conf.update(
        task_default_queue=QUEUE,
        task_acks_late=os.environ.get("PLAIN_LATE") == "1",
        task_ignore_result=True,
        worker_pool="threads",
        worker_concurrency=load_settings(WorkerSettings).slots,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"visibility_timeout": VISIBILITY},
    )
    return made


app = make_app()


@app.task(name="plain.work")  # type: ignore[untyped-decorator]
def work(key: str, tokens: int) -> None:
    """Take the time, then do the one thing this task is for."""
    settings = load_settings(WorkerSettings)
    slots = settings.slots or 1
    table = load_table(settings.model or "", slots, time=1.0, power=1.0, cpu_watts=(1.0, 4.0))
    time.sleep(table.prefill(8) + tokens * table.decode(slots, 32.0 * slots))
    with Path(_DONE).open("ab", buffering=0) as effects:
        effects.write(f"{key}\n".encode())


def produce(name: str, folder: Path, seed: str) -> None:
    """As `chaos.producer`, but a task that could not be sent is not sent again: a producer cannot know whether it
    was."""
    rng = random.Random(seed)
    record = (folder / f"{name}.record").open("ab", buffering=0)
    client = redis.Redis.from_url(load_settings().url)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    count = 0
    while not stopping:
        try:
            if int(client.llen(QUEUE)) > BACKLOG:  # type: ignore[arg-type]
                time.sleep(0.02)
                continue
            for _ in range(rng.randint(1, BATCH)):
                count += 1
                key = f"{name}.{count}"
                record.write(f"try {key}\n".encode())
                begun = time.time()
                sent = work.apply_async((key, rng.choice(LENGTHS)))
                record.write(f"ok {begun:.6f} {time.time():.6f} {sent.id}={key}\n".encode())
        except (OperationalError, redis.exceptions.RedisError):
            time.sleep(0.1)


@dataclass
class PlainOutcome:
    """What one run showed. `stuck` tasks are not done but still in the queue, or unacknowledged, long after all else;
    `last_second` were accepted just before a server that may forget that ended by force."""

    kills: int
    tasks: int
    lost: int
    stuck: int
    last_second: int
    doubled: int


def run(folder: Path, blows: Sequence[Blow], tasks: int, seed: int, *, late: bool, show: Show) -> PlainOutcome:
    """As `chaos.perllm.run`; blows meant for a scheduler or an API, which there are none of, are left out."""
    blows = [b for b in blows if b.role not in ("scheduler", "api")]
    folder.mkdir(parents=True, exist_ok=True)
    server = FragileServer(folder / "server")
    with World(folder, server, cluster := Cluster(server.url, folder), []) as world:
        lives = Counter[str]()

        def start_worker(name: str) -> Process:
            profile, slots = REPLAYS[name]
            return cluster.start_worker("chaos.plain", name, model=profile, slots=slots)

        def start_producer(name: str) -> Process:
            lives[name] += 1
            life = f"{name}.{lives[name]}"
            return cluster.start(name, "chaos.plain", life, str(folder), f"{seed}.{life}")

        world.posts += [Post(name, "worker", start_worker) for name in REPLAYS]
        world.posts += [Post(name, "producer", start_producer) for name in PRODUCERS]
        client = redis_of(cluster.ledger)

        def done() -> int:
            return len(set(_effects(folder)))

        def unfinished() -> int | None:
            try:
                return int(client.llen(QUEUE)) + int(client.hlen("unacked"))  # type: ignore[arg-type]
            except redis.exceptions.RedisError:
                return None

        os.environ["PLAIN_LATE"] = str(int(late))
        world.rain(blows, tasks, done, show)
        world.dismiss("producer")
        world.settle(unfinished, SETTLE)
        show(len(world.struck), done())
        world.dismiss("worker")
        held = _held(client)
    forgetful = [o.at for o in server.outages if o.fsync == "everysec"]
    _, told, _ = read_records(folder)
    effects = Counter(_effects(folder))
    undone = [t for t in told if t.key not in effects]
    gone = [t for t in undone if t.id not in held]
    excused = sum(any(t.begun <= at <= t.at + WINDOW for at in forgetful) for t in gone)
    return PlainOutcome(
        kills=len(world.struck),
        tasks=len(told),
        lost=len(gone) - excused,
        stuck=len(undone) - len(gone),
        last_second=excused,
        doubled=sum(1 for n in effects.values() if n > 1),
    )


def _held(client: redis.Redis) -> set[str]:
    """Ids of the messages Celery still has."""
    waiting = cast("list[bytes]", client.lrange(QUEUE, 0, -1))
    unacknowledged = (json.loads(raw)[0] for raw in cast("list[bytes]", client.hvals("unacked")))
    return {m["headers"]["id"] for m in (*map(json.loads, waiting), *unacknowledged)}


def _effects(folder: Path) -> list[str]:
    path = folder / _DONE
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    produce(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
