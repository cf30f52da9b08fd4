"""A server's pieces become ours, however it cuts, numbers or leaves out what it sends."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.cloud_worker.openai_api import ChunkDelta, Malformed
from perllm.cloud_worker.remote_answer import RemoteAnswer


def call(index: int | None, *, name: str | None = None, arguments: str | None = None, id: str | None = None) -> Any:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}


def through(*pieces: Any) -> tuple[RemoteAnswer, list[tuple[Any, ...]]]:
    """(the answer, what was told of it)."""
    answer = RemoteAnswer()
    deltas = [delta for piece in pieces for delta in answer.take(ChunkDelta.model_validate(piece), 1)]
    deltas += answer.close()
    told: dict[Any, list[str]] = {}
    for delta in deltas:
        if delta.call is not None:
            told.setdefault(delta.call, ["", ""])
            told[delta.call][0] += delta.name or ""
            told[delta.call][1] += delta.arguments
    assert "".join(delta.text for delta in deltas) == answer.text
    assert "".join(delta.reasoning for delta in deltas) == (answer.reasoning or "")
    assert [tuple(each) for each in told.values()] == [(each.name, each.arguments) for each in answer.calls]
    return answer, [tuple(each) for each in told.values()]


@given(st.text(max_size=20), st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_arguments_come_in_any_pieces(text: str, cuts: list[int], numbered: bool) -> None:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    index = 0 if numbered else None
    _, told = through(call(index, name="f", id="x"), *(call(index, arguments=piece) for piece in pieces))
    assert told == [("f", text or "{}")]


def test_calls_side_by_side_thoughts_and_text() -> None:
    answer, told = through(
        {"reasoning_content": "Hm"},
        {"reasoning": "m."},
        {"content": "I look."},
        call(3, name="f", id="x"),
        call(7, arguments='{"early"'),
        call(3, arguments='{"a": '),
        call(7, name="g", arguments=": 1}"),
        call(3, arguments="1}"),
    )
    assert (answer.text, answer.reasoning, answer.reasoning_tokens) == ("I look.", "Hmm.", 2)
    assert told == [("f", '{"a": 1}'), ("g", '{"early": 1}')]
    assert answer.calls[0].id == "x"
    assert answer.calls[1].id.startswith("call_")
    assert answer.called


def test_whole_calls_without_numbers_are_several() -> None:
    _, told = through(call(None, name="f", arguments="{}"), call(None, name="f", arguments='{"a": 2}'))
    assert told == [("f", "{}"), ("f", '{"a": 2}')]


def test_arguments_that_are_no_object_do_not_end_as_calls() -> None:
    assert not through(call(0, name="f", arguments='{"a": '))[0].called
    assert not through(call(0, arguments="{}"))[0].called  # nobody was called


@pytest.mark.parametrize("pieces", [[call(0, name="no name\n")], [call(n, name="f") for n in range(200)]])
def test_what_no_api_sends_is_malformed(pieces: list[Any]) -> None:
    with pytest.raises(Malformed):
        through(*pieces)
