"""One run of the whole system under blows, and its history."""

from __future__ import annotations

import os
import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from support import users
from support.cluster import Cluster, Process
from support.ports import free_port

from chaos.checker import Report, check
from chaos.history import History, Seen
from chaos.observer import Observer, dump, unfinished
from chaos.plan import Blow
from chaos.producer import DEADLINE, read_records
from chaos.server import FragileServer, MovingServer
from chaos.world import Post, Show, Struck, World
from perllm.broker.errors import Unreachable
from perllm.broker.ledger.scheduler import DISPATCH_LEASE
from perllm.broker.worker.settings import WorkerSettings
from perllm.scheduler.settings import SchedulerSettings

ROOT = Path(__file__).parents[2]
#: Where the processes find this tree's modules.
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
#: The nodes that replay a profile, and their slots.
REPLAYS = {
    "cloud-1": ("vllm-0.25.1_h200_llama-8b-bf16", 32),
    "cloud-2": ("vllm-0.25.1_h200_llama-33b-bf16", 32),
    "edge-1": ("llamacpp-0.3.36_xeon-spr_llama-8b-q4_0", 8),
    "edge-2": ("llamacpp-0.3.36_xeon-spr_llama-8b-q4_0", 8),
}
#: What the real model is called, and which node has it.
REAL, REAL_NODE = "real", "edge-real"
SCHEDULERS = ("scheduler-1", "scheduler-2")
PRODUCERS = ("producer-1", "producer-2")
#: One more hands its tasks in over HTTP.
API, API_PRODUCER = "api", "producer-http"
#: Seconds for which what struck a scheduler or the server may still be felt.
SHADOW = 8.0
#: Seconds without any change after which what is unfinished is stuck. A policy may let a task rest nearly until its
#: deadline, and what was dispatched may wait unclaimed for a while.
SETTLE = DEADLINE + DISPATCH_LEASE + 5.0


@dataclass
class Outcome:
    """What one run showed. `recovery`: see `recoveries`."""

    report: Report
    kinds: dict[str, int]
    recovery: dict[str, list[tuple[float, bool]]]
    crashes: list[str]
    settled: bool
    by_model: dict[str, int]  # completed
    tracebacks: list[str]

    @property
    def good(self) -> bool:
        """Whether everything held."""
        return self.settled and not self.report.violations and not self.crashes

    @property
    def figures(self) -> dict[str, float | int]:
        """What the result's `figures` hold of it."""
        report = self.report
        return {
            "kills": sum(self.kinds.values()),
            "tasks": report.tasks,
            "lost": report.count("lost"),
            "doubled": report.count("doubled", "overwritten"),
            "stuck": report.count("stuck"),
            "recovery_s_max": max((s for times in self.recovery.values() for s, _ in times), default=0.0),
            "recovery_alone_s_max": max(
                (s for times in self.recovery.values() for s, alone in times if alone), default=0.0
            ),
        }

    @property
    def details(self) -> dict[str, object]:
        report = self.report
        return {
            "kills_by_kind": self.kinds,
            "ended": dict(sorted(report.ended.items())),
            "completed_by_model": self.by_model,
            "attempts_max": report.attempts_max,
            "last_second_lost": report.forgiven,
            "last_second_oldest_s": round(report.oldest, 3),
            "recovery_s": {kind: _spread([s for s, _ in times]) for kind, times in sorted(self.recovery.items())},
            "violations": [f"{v.kind} {v.subject}: {v.detail}" for v in report.violations[:20]],
            "crashes": self.crashes[:5],
            "tracebacks": self.tracebacks[:20],
        }


def run(
    folder: Path,
    blows: Sequence[Blow],
    tasks: int,
    seed: int,
    *,
    policy: str | None = None,
    real: bool,
    replicas: int | None = None,
    show: Show,
) -> Outcome:
    """Let the blows fall on a fresh system while producers keep it busy with at least so many tasks; then let it
    finish, stop it, and check it. The environment's PYTHONPATH must be ours. With `replicas`, which is PERLLM_REPLICAS,
    the server is a primary with a replica and three sentinels, and every blow on it kills the primary."""
    folder.mkdir(parents=True, exist_ok=True)
    server = (
        FragileServer(folder / "server", users.rules())
        if replicas is None
        else MovingServer(folder / "server", users.rules(), waits=replicas > 0)
    )
    # As shipped, but for bounds that a run of this length reaches.
    defaults = SchedulerSettings.model_fields | WorkerSettings.model_fields
    shipped = {n: defaults[n].default for n in ("policy", "lease", "heartbeat", "leader_ttl", "grace")}
    if policy is not None:
        shipped["policy"] = policy
    if replicas is not None:
        shipped["replicas"] = replicas
    bounds = {"retention_tasks": max(500, tasks // 10), "stream_length": 100_000, "snapshot_every": 1.0}
    with World(folder, server, cluster := Cluster(server.url, folder, **shipped, **bounds), []) as world:
        world.posts += _posts(cluster, folder, seed, real=real)
        observer = Observer(cluster.settings)
        world.came_back = observer.server_came_back

        def done() -> int | None:
            try:
                totals = cluster.ledger.totals()
            except Unreachable:
                return None
            return sum(totals.get(s, 0) for s in ("succeeded", "failed", "expired", "rejected", "cancelled"))

        world.rain(blows, tasks, done, show)
        world.dismiss("producer")
        settled = world.settle(lambda: unfinished(cluster.ledger), SETTLE)
        show(len(world.struck), done() or 0)
        world.dismiss("worker", "api")
        world.dismiss("scheduler")
        observer.close()
        tried, told, saw = read_records(folder)
        history = History(
            tried,
            told,
            saw,
            observer.events,
            observer.undone,
            server.outages,
            dump(cluster.ledger),
            cluster.settings.max_strikes,
            cluster.settings.retention_tasks,
        )
        lines = [line for post in world.posts for line in _tracebacks(folder / f"{post.name}.log")]
        refused = [f"refused {what}" for what in users.denied(server.url)]
        takeovers = [at for name in SCHEDULERS for at in _takeovers(folder / f"{name}.log")]
    return Outcome(
        report=check(history),
        kinds=world.kinds(),
        recovery=recoveries(world.struck, observer.events, takeovers),
        crashes=[*world.crashes, *refused],
        settled=settled,
        by_model=dict(Counter(e.model for e in observer.events if e.type == "completed")),
        tracebacks=lines,
    )


def _posts(cluster: Cluster, folder: Path, seed: int, *, real: bool) -> list[Post]:
    lives = Counter[str]()
    port = free_port()

    def replay(name: str) -> Process:
        profile, slots = REPLAYS[name]
        return cluster.start_worker("support.replay_worker", name, node_name=name, model=profile, slots=slots)

    def real_engine(name: str) -> Process:
        return cluster.start_node(name, engine="llama", model_name=REAL, slots=2, threads=1)

    def produce(name: str) -> Process:
        lives[name] += 1
        life = f"{name}.{lives[name]}"
        url = f"http://127.0.0.1:{port}" if name == API_PRODUCER else ""
        return cluster.start(name, "chaos.producer", life, str(folder), f"{seed}.{life}", REAL if real else "", url)

    def serve(name: str) -> Process:
        return cluster.start(name, "perllm.broker.api", data_dir=folder / name, api_port=port, api_open=True)

    return [
        *(Post(name, "scheduler", cluster.start_scheduler) for name in SCHEDULERS),
        *(Post(name, "worker", replay) for name in REPLAYS),
        *(Post(name, "worker", real_engine) for name in (REAL_NODE,) if real),
        Post(API, "api", serve),
        *(Post(name, "producer", produce) for name in (*PRODUCERS, API_PRODUCER)),
    ]


def _tracebacks(log: Path) -> list[str]:
    text = log.read_text(errors="replace") if log.exists() else ""
    return [f"{log.name}: {line}" for line in text.splitlines() if line.startswith("Traceback ")]


def _takeovers(log: Path) -> list[float]:
    """When a scheduler began to lead with everything known."""
    text = log.read_text(errors="replace") if log.exists() else ""
    words = [line.split() for line in text.splitlines() if " took_over " in line]
    return [datetime.fromisoformat(first).timestamp() for first, *_ in words]


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(times), 3), "max": round(max(times), 3), "n": len(times)}


def recoveries(
    struck: Sequence[Struck], events: Sequence[Seen], takeovers: Sequence[float]
) -> dict[str, list[tuple[float, bool]]]:
    """Seconds, per kind of blow, until the system was over it: a worker's death noticed (or the worker back), the next
    dispatch or takeover after a scheduler's, the next completion after the server answers again. Where the server was
    away meanwhile, counted from its return, since nobody can notice anything without it. Beside each, whether neither a
    scheduler nor the server was struck just before or meanwhile."""
    away = [s.until for s in struck if s.until]
    noticed = defaultdict(list)  # type, or node → when
    for event in events:
        noticed[event.node if event.type in ("node_up", "node_down") else event.type].append(event.at)
    found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for blow in struck:
        match blow.kind.split("."):
            case ["worker", "kill" | "poison"]:
                times, since = noticed[blow.name], blow.at
            case ["scheduler", "kill"]:
                times, since = sorted([*noticed["dispatched"], *takeovers]), blow.at
            case ["server", "failover"]:
                if (index := bisect_right(noticed["completed"], blow.until)) < len(noticed["completed"]):
                    found[blow.kind].append((noticed["completed"][index] - blow.at, True))
                continue
            case ["server", _]:
                times, since = noticed["completed"], blow.until
            case _:
                continue
        if (index := bisect_right(times, since)) < len(times):
            end = times[index]
            begin = max([since, *(until for until in away if since < until <= end)])
            others = (s for s in struck if s is not blow and s.kind.startswith(("scheduler", "server")))
            alone = not any(blow.at - SHADOW < s.at < end for s in others)
            found[blow.kind].append((end - begin, alone))
    return found
