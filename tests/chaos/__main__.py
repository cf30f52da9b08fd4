"""`make chaos`: kills at random moments under load, then the checker; then the first quarter of the same kills on plain
Celery with early and with late acknowledgement. Prints one JSON line and keeps it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import emit
from chaos import perllm, plain
from chaos.plan import Blow, plan
from chaos.world import Show

#: Share of the kills and of the tasks that plain Celery gets.
PEER_SHARE = 0.25
QUICK = {"kills": 30, "tasks": 4_000}
#: Shorter runs are not recorded.
LONG = {"kills": 220, "tasks": 100_000}


def main() -> int:
    options = parse()
    os.environ["PYTHONPATH"] = perllm.PYTHONPATH
    for name in [n for n in os.environ if n.startswith("PERLLM_")]:
        del os.environ[name]
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    blows = plan(options.seed, options.kills, options.gap, options.only)
    outcome = perllm.run(
        folder / "perllm",
        blows,
        options.tasks,
        options.seed,
        policy=options.policy,
        real=True,
        replicas=options.replicas,
        show=progress("PerLLM", len(blows), options.tasks),
    )
    figures = dict(outcome.figures)
    more = {"seed": options.seed, **outcome.details, "took_s": round(time.monotonic() - began, 1)}
    if options.peer:
        print(f"PerLLM: {json.dumps(figures)}", file=sys.stderr)  # known, whatever becomes of the peer's runs
        more["celery"] = {}
        for name, peer in peers(folder, blows, options.tasks, options.seed).items():
            figures |= {f"celery_{name}_{what}": getattr(peer, what) for what in ("lost", "doubled", "stuck")}
            more["celery"][name] = asdict(peer)
    emit(
        "chaos" if options.replicas is None else f"chaos-failover-{options.replicas}",
        figures,
        {},
        keep=options.record,
        **more,
    )
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if outcome.good else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="which blows fall on whom (default %(default)s)")
    parser.add_argument("--kills", type=int, default=LONG["kills"], help="(default %(default)s)")
    parser.add_argument("--tasks", type=int, default=LONG["tasks"], help="at least so many (default %(default)s)")
    parser.add_argument("--gap", type=float, default=2.0, help="mean seconds between kills (default %(default)s)")
    quick = ", ".join(f"{n:,} {what}" for what, n in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"at most {quick}; no peer")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, help="plain Celery as well")
    parser.add_argument("--policy", help="of the scheduler (default: the one shipped)")
    parser.add_argument("--only", help="one kind of kill, as in server.power_cut")
    about = (
        "a primary with a replica and three sentinels, under this PERLLM_REPLICAS; blows on the server kill the primary"
    )
    parser.add_argument("--failover", type=int, metavar="N", dest="replicas", help=about)
    parser.add_argument("--keep", type=Path, help="run in this folder and keep it: logs, records, the server's files")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.tasks = min(options.kills, QUICK["kills"]), min(options.tasks, QUICK["tasks"])
    options.record = options.kills >= LONG["kills"] and options.tasks >= LONG["tasks"] and options.only is None
    options.peer = options.record and options.replicas is None if options.peer is None else options.peer
    return options


def peers(folder: Path, blows: Sequence[Blow], tasks: int, seed: int) -> dict[str, plain.PlainOutcome]:
    """Plain Celery under the same blows, early and late acknowledgement."""
    blows, tasks = blows[: max(1, int(len(blows) * PEER_SHARE))], int(tasks * PEER_SHARE)
    return {
        name: plain.run(
            folder / f"celery-{name}",
            blows,
            tasks,
            seed,
            late=name == "late",
            show=progress(f"Celery, {name} acknowledgement", len(blows), tasks),
        )
        for name in ("early", "late")
    }


def progress(what: str, kills: int, tasks: int) -> Show:
    """Shows how far a run is: one line that is written over on a terminal, elsewhere one every half a minute."""
    began = time.monotonic()
    due = 0.0

    def show(struck: int, done: int) -> None:
        nonlocal due
        passed = time.monotonic() - began
        if passed < due:
            return
        terminal = sys.stderr.isatty()
        due = passed + (0.5 if terminal else 30.0)
        line = f"{what}: {struck} of {kills} kills, {done:,} of {tasks:,} tasks, {passed:.0f} s"
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
