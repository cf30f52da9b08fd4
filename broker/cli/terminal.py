"""What people see in the terminal: progress while tasks run, tables, one decision explained."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from perllm.broker.ledger import Gone
from perllm.broker.messages import Counters, Explanation, Heartbeat, LengthForecast, NodeInfo, Result, State
from perllm.broker.tables import line, table

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

#: Seconds between progress lines where there is no terminal to draw on.
_LINE_EVERY = 5.0


class Tally:
    """What has come back so far: counts by node and state, and the on-time share."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.results: list[Result] = []
        self.nodes: Counter[str] = Counter()
        self.states: Counter[State] = Counter()

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.states[result.state] += 1
        if result.receipt is not None:
            self.nodes[result.receipt.node] += 1

    @property
    def on_time(self) -> int:
        return sum(r.on_time for r in self.results)

    def line(self) -> str:
        done = len(self.results)
        share = f"{self.on_time / done:.0%} on time" if done else "none yet"
        nodes = ", ".join(f"{n} {c}" for n, c in sorted(self.nodes.items()))
        return f"{done}/{self.total} finished, {share}" + (f"; by node: {nodes}" if nodes else "")


def watch(console: Console, results: Iterable[Result], tally: Tally, *, title: str) -> Iterator[Result]:
    """Pass results through while showing progress: a live bar on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        yield from _watch_lines(console, results, tally, title)
        return
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    bar = progress.add_task(title, total=tally.total)
    detail = Text()
    with Live(Group(progress, detail), console=console, refresh_per_second=8, transient=True):
        for result in results:
            tally.add(result)
            progress.advance(bar)
            detail.plain = f"  {tally.line()}"
            yield result


def _watch_lines(console: Console, results: Iterable[Result], tally: Tally, title: str) -> Iterator[Result]:
    due = time.monotonic() + _LINE_EVERY
    for result in results:
        tally.add(result)
        if time.monotonic() >= due or len(tally.results) == tally.total:
            console.print(f"{title}: {tally.line()}", highlight=False)
            due = time.monotonic() + _LINE_EVERY
        yield result


def node_summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Per node, of the tasks that ran there: counts, latency s, tokens/s while generating, J per task and how known."""
    rows = []
    for node in sorted({r.receipt.node for r in results if r.receipt}):
        mine = [(r, r.receipt) for r in results if r.receipt and r.receipt.node == node]
        latencies = sorted(r.latency for r, _ in mine)
        seconds = sum(receipt.prefill + receipt.decode for _, receipt in mine)
        energies = [receipt.energy for _, receipt in mine]
        rows.append(
            {
                "node": node,
                "model": mine[0][1].model,
                "tasks": len(mine),
                "on_time": sum(r.on_time for r, _ in mine),
                "latency_p50": statistics.median(latencies),
                "latency_p95": latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
                "tokens_per_s": sum(receipt.completion_tokens for _, receipt in mine) / seconds if seconds else None,
                "joules_per_task": statistics.fmean(e.total for e in energies),
                "energy_method": energies[0].method,
                "energy_estimated": any(e.estimated for e in energies),
            }
        )
    return rows


def node_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """`node_summary` as a table."""
    numbers = ("tasks", "on time", "p50 s", "p95 s", "tokens/s", "J/task")
    view = table(
        "node", *numbers, "energy by", numbers=numbers, flexible=("node", "energy by"), title="What each node did"
    )
    for row in rows:
        rate = row["tokens_per_s"]
        view.add_row(
            line(row["node"]),
            str(row["tasks"]),
            f"{row['on_time'] / row['tasks']:.0%}",
            f"{row['latency_p50']:.2f}",
            f"{row['latency_p95']:.2f}",
            "-" if rate is None else f"{rate:.1f}",
            f"{row['joules_per_task']:.2f}",
            f"{row['energy_method']}, {'estimated' if row['energy_estimated'] else 'measured'}",
        )
    return view


def explanation(task_id: str, why: Explanation) -> Group:
    """One decision: its sentence, and how every node looked."""
    head = Text(f"Why {task_id}: {why.action} by {why.policy}.\n{why.sentence}")
    if why.length is not None:
        head.append(f"\n{_length(why.length)}")
    if not why.candidates:
        return Group(head)
    numbers = ("index", "finish s", "p(on time)", "ΔJ")
    view = table("node", *numbers, "slacks and reasons", numbers=numbers, flexible=("node", "slacks and reasons"))
    for c in why.candidates:
        slacks = ", ".join(f"{name} {slack:+.2f}" for name, slack in c.slacks.items())
        reasons = [slacks + (" (infeasible)" if slacks and not c.feasible else ""), c.note]
        chosen = c.node == why.node
        view.add_row(
            line(f"{'▶' if chosen else ' '} {c.node}"),
            _number(c.index),
            _number(c.finish),
            _number(c.p_on_time),
            _number(c.marginal_energy),
            "\n".join(r for r in reasons if r),
            style="bold" if chosen else "",
        )
    return Group(head, view)


_SOURCES = {
    "class": "earlier tasks of its class",
    "text": "earlier tasks with such texts",
    "prompt": "earlier runs of this prompt",
}


def _length(length: LengthForecast) -> str:
    """'About 120 tokens, 9 in 10 below 300, by …'"""
    words = [f"'{i.words}' (×{i.factor:.2f})" for i in length.because if i.words]
    sentence = f"About {length.median:.0f} tokens, 9 in 10 below {length.most:.0f}, by {_SOURCES[length.source]}"
    return f"{sentence}: {', '.join(words)}" if words else sentence


def nodes(
    rows: Sequence[tuple[NodeInfo, Heartbeat | None, bool]], distrusted: Mapping[str, str], dead: Sequence[Gone] = ()
) -> Table:
    """Live nodes with what they last said of themselves, and why some are sent little; and those that died."""
    numbers = ("active", "waiting", "tokens", "energy")
    view = table(
        "queue",
        "engine and models",
        *numbers,
        "state",
        numbers=numbers,
        flexible=("queue", "engine and models", "state"),
    )
    for info, beat, draining in rows:
        c = beat.counters if beat else Counters()
        offered = (f"{m.name}: {', '.join(sorted(m.capabilities))}" for m in info.models)
        view.add_row(
            line(info.queue),
            Text("\n".join([info.engine, *offered])),
            f"{c.active} of {info.slots}",
            str(c.waiting),
            str(c.generated),
            f"{c.energy:.0f} J{' est.' if info.power.estimated else ''}",
            "draining" if draining else f"distrusted:\n{distrusted[info.name]}" if info.name in distrusted else "up",
        )
    for info, at, _ in dead:
        died = datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="seconds")
        view.add_row(
            line(info.queue), Text(info.engine), "-", "-", "-", "-", f"dead since {died[:16]} UTC", style="dim"
        )
    return view


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def print_json(data: Any) -> None:
    """For programs: one line on standard output."""
    print(json.dumps(data, ensure_ascii=False))
