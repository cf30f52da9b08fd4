"""`make attack`: a hostile tenant for ten minutes beside a neighbour with a light load. Prints what was tried and what
it did, one JSON line last; the exit status is 1 where a promise was broken."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from attack import campaign
from attack.kinds import KINDS
from attack.verdict import Verdict
from benchmarks.common import machine, versions

#: Seconds the neighbour has alone, and seconds of the attack, of a short run.
QUICK = (8.0, 24.0)
ALONE = 60.0


def main() -> int:
    options = parse()
    alone, seconds = QUICK if options.quick else (ALONE, options.minutes * 60)
    if options.only:
        alone = min(alone, 15.0)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="attack-"))
    began = time.monotonic()
    verdict = campaign.run(folder / "run", options.seed, alone, seconds, only=options.only, show=progress())
    tables(verdict, options.seed)
    result = {
        "bench": "attack",
        "figures": verdict.figures,
        "spread": {},
        "seed": options.seed,
        "only": options.only,
        "attack_s": seconds,
        "took_s": round(time.monotonic() - began, 1),
        **campaign.details(verdict),
        "machine": machine(),
        "versions": versions(),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if verdict.failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="which attacks, in which order (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the attack (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK[0]:g} s alone, {QUICK[1]:g} s of attack")
    parser.add_argument(
        "--only",
        choices=sorted(KINDS),
        action="append",
        default=[],
        metavar="KIND",
        help=f"attacks of this kind only, and of others so named: {', '.join(sorted(KINDS))}",
    )
    parser.add_argument("--keep", type=Path, help="run in this folder and keep it: logs, records, the server's files")
    parser.add_argument("--out", type=Path, help="write the result here too, as in benchmarks/results/attack.json")
    return parser.parse_args()


def tables(verdict: Verdict, seed: int) -> None:
    """What was tried and how it was answered, memory, and what broke; on standard error, for people."""
    console = Console(stderr=True)
    tried = Table("kind", "attacks", "answers to its requests", title=f"the hostile tenant, seed {seed}")
    for kind, counts in verdict.kinds.items():
        answers = ", ".join(f"{n} {said}" for said, n in counts.items() if said != "attacks")
        tried.add_row(kind, str(counts["attacks"]), answers)
    memory = Table("part", "alone", "most", "limit", title="memory, MB")
    for part, row in verdict.memory.items():
        memory.add_row(part, *map(str, row.values()))
    figures = Table("figure", "", title="the neighbour, and the system")
    for name, value in verdict.figures.items():
        figures.add_row(name, str(value))
    for table in (tried, memory, figures):
        console.print(table)
    for failure in verdict.failures:
        console.print(f"BROKEN: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(verdict.failures)} promises broken" if verdict.failures else "every promise held")


def progress() -> campaign.Show:
    """Shows how far a run is: one line that is written over on a terminal, elsewhere one every half a minute."""
    due = 0.0

    def show(phase: str, left: float) -> None:
        nonlocal due
        if time.monotonic() < due:
            return
        terminal = sys.stderr.isatty()
        due = time.monotonic() + (0.5 if terminal else 30.0)
        line = f"{phase}, {left:.0f} s left" if left else phase
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
