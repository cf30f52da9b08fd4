"""`perllm demo`: the whole system on this machine, about 60 real tasks, and what became of them."""

from __future__ import annotations

import importlib.resources
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from perllm.broker.cli import terminal as show
from perllm.broker.client import Client
from perllm.broker.errors import BadSetting
from perllm.broker.local.supervisor import START_TIMEOUT, Supervisor
from perllm.broker.messages import Result, State, TaskSpec, new_id
from perllm.broker.openai import batch_file as batch
from perllm.broker.settings import load_settings

#: Seconds between looks for due submissions and new results.
_TICK = 0.05
EDGES, CLOUDS = ("edge-1", "edge-2"), ("cloud-1",)


def run(path: Path | None, rate: float, console: Console) -> dict[str, Any]:
    """Start everything, run the tasks at `rate` per s, print tables, stop everything. Returns the report as data."""
    folder = Path(tempfile.mkdtemp(prefix="perllm-demo-"))
    settings = load_settings(data_dir=folder)
    with Supervisor(settings, edges=EDGES, clouds=CLOUDS) as supervisor:
        await_nodes(supervisor, console)
        with Client(supervisor.url) as client:
            for info, _, _ in client.ledger.nodes():
                console.print(f"  {info.queue}: {info.engine}, {info.slots} slots", highlight=False)
            specs = [client.accept(fields) for fields in _tasks(path)]
            report = _run(client, specs, rate, console)
    shutil.rmtree(folder, ignore_errors=True)  # kept, with its logs, when something above failed
    return report


def await_nodes(supervisor: Supervisor, console: Console) -> None:
    """Wait until every node of the supervisor has registered and a scheduler leads, saying what is awaited and what
    ended meanwhile. Raises BadSetting for a part that ends because of a wrong setting, and after START_TIMEOUT."""
    give_up = time.monotonic() + START_TIMEOUT
    began = time.monotonic()
    with console.status("starting …") as spinner:
        while waiting := supervisor.waiting_for():
            spinner.update(f"starting: waiting for {', '.join(sorted(waiting))} (loading, calibrating, compiling) …")
            if time.monotonic() > give_up:
                raise BadSetting(f"{', '.join(waiting)} did not appear in {START_TIMEOUT:.0f} s; see {supervisor.logs}")
            for line in supervisor.tend():
                console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
            time.sleep(0.1)
    console.print(f"all nodes up after {time.monotonic() - began:.1f} s", highlight=False)


def _tasks(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        text = importlib.resources.files("perllm.broker").joinpath("demo_tasks.jsonl").read_text(encoding="utf-8")
        lines = text.splitlines()
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise BadSetting(f"{path}: {error.strerror}") from None
    fields = []
    for line in batch.read(lines):
        if isinstance(line, batch.BadLine):
            raise BadSetting(f"{path or 'demo_tasks.jsonl'}:{line.number}: {line.reason}")
        fields.append(dict(line.fields))
    return fields


def _run(client: Client, specs: list[TaskSpec], rate: float, console: Console) -> dict[str, Any]:
    began = time.monotonic()
    tally = show.Tally(len(specs))
    for _ in show.watch(console, _paced(client, specs, rate), tally, title="tasks"):
        pass
    took = time.monotonic() - began
    rows = show.node_summary(tally.results)
    console.print(show.node_table(rows))
    console.print(f"{tally.line()}; {_states(tally)}; {took:.1f} s in all", highlight=False)
    told = _worth_telling(tally.results)
    why = client.explain(told.id) if told else None
    if told is not None and why is not None:
        console.print(f"\n“{client.status(told.id).spec.preview()}”", highlight=False, markup=False)
        console.print(show.explanation(told.id, why))
    return {
        "tasks": tally.total,
        "seconds": took,
        "on_time": tally.on_time / tally.total,
        "states": dict(tally.states),
        "nodes": rows,
        "explained": why.model_dump() if why else None,
    }


def _paced(client: Client, specs: list[TaskSpec], rate: float) -> Iterator[Result]:
    """Submit `rate` tasks per s; results as they come."""
    began = time.monotonic()
    out: list[str] = []
    submitted = 0
    while submitted < len(specs) or out:
        due = min(len(specs), 1 + int((time.monotonic() - began) * rate))
        out += client.ledger.submit([(new_id(), spec) for spec in specs[submitted:due]])
        submitted = due
        for result in client.ledger.results(out):
            if result is not None:
                out.remove(result.id)
                yield result
        time.sleep(_TICK)


def _states(tally: show.Tally) -> str:
    return ", ".join(f"{n} {state}" for state, n in sorted(tally.states.items()))


def _worth_telling(results: list[Result]) -> Result | None:
    """The last task that ran: by then the policy had learned the most."""
    return next((r for r in reversed(results) if r.state is State.SUCCEEDED), None)
