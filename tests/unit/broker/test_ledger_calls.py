"""What the ledger's functions take is named at one place, `ledger.lua`, and Python keeps to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from perllm.broker.ledger import Entry
from perllm.broker.ledger.script import OPERATIONS, call

LUA = (Path(__file__).parents[3] / "broker" / "ledger" / "ledger.lua").read_text(encoding="utf-8")


def test_arguments_are_called_by_name_and_sent_in_order() -> None:
    assert call("claim", token="u", lease=5, id="t", attempt=1, node="n") == ("claim", "t", 1, "n", "u", 5)
    assert call("revoke", ["a", "b"], most=3, keep=60) == ("revoke", 60, 3, "a", "b")


def test_arguments_that_the_function_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="claim takes"):
        call("claim", id="t", attempt=1, node="n", token="u")
    with pytest.raises(TypeError, match="cancel lacks 'id'"):
        call("cancel", task="t")
    with pytest.raises(TypeError, match="cancel takes"):
        call("cancel", ["t2"], id="t")
    with pytest.raises(TypeError, match="submit takes"):
        call("submit", ["t", "{}"])


def test_a_task_is_written_as_submit_names_it() -> None:
    assert OPERATIONS["submit"].each == Entry._fields


def test_every_function_is_found_and_gets_all_its_arguments() -> None:
    assert set(OPERATIONS) == set(re.findall(r"^(?:function )?ops\W+(\w+)", LUA, re.MULTILINE))
    most = re.search(r"^local MOST_NAMED = (\d+)", LUA, re.MULTILINE)
    assert most
    assert max(len(o.arguments) for o in OPERATIONS.values()) <= int(most[1])
    for name, operation in OPERATIONS.items():
        if operation.each:  # where they begin in ARGV
            body = LUA.partition(f"function ops.{name}(")[2]
            begin, words = len(operation.arguments), len(operation.each)
            first = "FIRST" + (f" + {begin}" if begin else "")
            step = f", {words}" if words > 1 else ""
            assert f"for i = {first}, #ARGV{step} do" in body.partition("\nend\n")[0], name
