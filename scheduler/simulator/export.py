"""`perllm trace export`: a live system's event stream as a trace that `perllm simulate --trace` replays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from perllm.broker.ledger import Ledger, later
from perllm.broker.messages import Event
from perllm.broker.settings import load_settings
from perllm.scheduler.simulator.trace import write_trace

app = typer.Typer(help="Traces of a live system, for `perllm simulate --trace`.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `export` a subcommand of its own, although it is the only one."""


@app.command()
def export(file: Annotated[Path, typer.Argument(help="Where to write it (JSON lines).")]) -> None:
    """Write every event the stream still holds: task ids and node names are in it, prompts and outputs are not."""
    ledger = Ledger(load_settings())
    count = write_trace(file, _until_now(ledger))
    print(f"{count} events written to {file}")


def _until_now(ledger: Ledger) -> Iterator[Event]:
    position, (_, newest) = "0-0", ledger.first_and_last_event()
    while later(newest, position) and (entries := ledger.events(position)):
        yield from (event for _, event in entries)
        position = entries[-1][0]
