"""`make chaos`: kills at random moments under load, then the checker. Prints one JSON line and keeps it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import emit
from chaos import perllm
from chaos.plan import plan


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="which blows fall on whom (default %(default)s)")
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--gap", type=float, default=2.0, help="mean seconds between kills (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="30 kills, 4,000 tasks; nothing is recorded")
    parser.add_argument("--policy", help="of the scheduler (default: the one shipped)")
    parser.add_argument("--only", help="one kind of kill, as in server.power_cut")
    parser.add_argument("--keep", type=Path, help="run in this folder and keep it: logs, records, the server's files")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.tasks = min(options.kills, 30), min(options.tasks, 4_000)
    os.environ["PYTHONPATH"] = perllm.PYTHONPATH
    for name in [n for n in os.environ if n.startswith("PERLLM_")]:
        del os.environ[name]
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def show(kills: int, tasks: int) -> None:
        if sys.stderr.isatty():
            left = f"{kills}/{options.kills} kills, {tasks:,}/{options.tasks:,} tasks, {time.monotonic() - began:.0f} s"
            print(f"\r{left}\033[K", end="", file=sys.stderr, flush=True)

    blows = plan(options.seed, options.kills, options.gap, options.only)
    outcome = perllm.run(folder, blows, options.tasks, options.seed, policy=options.policy, real=True, show=show)
    more = {"seed": options.seed, "took_s": round(time.monotonic() - began, 1), **outcome.details}
    if options.quick:
        print(json.dumps({"bench": "chaos", "figures": outcome.figures, **more}))
    else:
        emit("chaos", outcome.figures, {}, **more)
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if outcome.report.violations or outcome.crashes or not outcome.settled else 0


if __name__ == "__main__":
    sys.exit(main())
