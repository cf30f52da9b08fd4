"""Tables for people in a terminal: whole at 80 columns, and with `--wide` as wide as what is in them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

#: Least characters of an id that are shown.
SHORT_ID = 8
#: Columns at most with `--wide`.
_WIDEST = 10_000

Wide = Annotated[bool, typer.Option("--wide", help="Show everything in full, however wide.")]


def table(
    *names: str, numbers: Collection[str] = (), flexible: Collection[str] = (), title: str | None = None
) -> Table:
    """An empty table with columns of these names. Where there is no room for all, those that are `flexible` give way:
    their text goes on in the next line, or if it is a `line`, is cut."""
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        justify: JustifyMethod = "right" if name in numbers else "left"
        view.add_column(name, justify=justify, no_wrap=name not in flexible, overflow="fold")
    return view


def line(text: str) -> Text:
    """What ends with an ellipsis where there is no room for it."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def show(console: Console, view: Table, *, wide: bool = False) -> None:
    """Print it."""
    if wide:
        for column in view.columns:
            column.no_wrap = True
        needed = Measurement.get(console, console.options.update(max_width=_WIDEST), view).maximum
        console = Console(file=console.file, width=max(console.width, needed))
    console.print(view)


def short_ids(ids: Collection[str]) -> dict[str, str]:
    """For each id as much of its beginning as tells it from the others."""
    ordered = sorted(set(ids))
    short = {}
    for before, task_id, after in zip(["", *ordered], ordered, [*ordered[1:], ""], strict=False):
        shared = max(_shared(before, task_id), _shared(task_id, after))
        short[task_id] = task_id[: max(SHORT_ID, shared + 1)]
    return short


def _shared(a: str, b: str) -> int:
    """Characters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
