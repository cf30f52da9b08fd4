"""Tables at 80 columns, and ids cut short."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from perllm.broker.tables import SHORT_ID, line, short_ids, show, table


@given(st.sets(st.text("ab01-", min_size=1, max_size=14), max_size=12))
def test_a_short_id_is_the_beginning_of_one_id_only(ids: set[str]) -> None:
    short = short_ids(ids)
    assert short.keys() == ids
    for task_id, begins in short.items():
        assert task_id.startswith(begins)
        assert len(begins) >= min(SHORT_ID, len(task_id))
        assert begins in ids or [i for i in ids if i.startswith(begins)] == [task_id]


@pytest.mark.parametrize("wide", [False, True])
def test_what_is_not_flexible_is_whole_and_the_rest_gives_way(wide: bool) -> None:
    console = Console(file=io.StringIO(), width=80)
    view = table("id", "node", "left s", "text", numbers=("left s",), flexible=("node", "text"))
    long = {"id": "0" * 20, "node": "n" * 64, "left": "123456.7", "text": "word " * 60}
    view.add_row(long["id"], line(long["node"]), long["left"], line(long["text"]))
    show(console, view, wide=wide)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert all(long[name] in shown for name in ("id", "left"))
    assert (long["text"].strip() in shown) == (long["node"] in shown) == wide
    assert (max(map(len, shown.splitlines())) <= 80) != wide
