"""Text out of token pieces: UTF-8 is never split, stop strings are found across token borders."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from perllm.broker.chat import AnswerForm
from perllm.broker.chat.forms import GENERIC
from perllm.broker.messages import Delta
from perllm.edge_worker.text_stream import TextStream

#: A small alphabet makes stop strings overlap and repeat; 😀 and é are cut by the pieces.
TEXT = st.text(alphabet="ab\né😀", max_size=30)
STOPS = st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3)


def pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(raw), *(c % (len(raw) + 1) for c in cuts)})
    return [raw[a:b] for a, b in pairwise(borders)]


def said(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def take(stream: TextStream, piece: bytes) -> str:
    """The text a token of these bytes releases."""
    return said(stream.take(7, piece))


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain rule: read character by character; the stop string complete first ends it, before its start."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(TEXT, STOPS, st.lists(st.integers(0, 200), max_size=20))
@example("aab", ["ab", "aab"], [1, 2])
@example("a😀b", ["😀b"], [2, 3])
def test_any_cut_into_pieces_gives_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    released = [take(stream, piece) for piece in pieces(text.encode(), cuts)]
    released.append(said(stream.finish()))
    want, stopped = expected(text, stops)
    assert "".join(released) == stream.text == want
    assert stream.stopped == stopped
    assert stream.extent == len(want)


@given(TEXT, STOPS, st.lists(st.integers(0, 200), max_size=20))
def test_what_is_released_is_never_taken_back(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    so_far = ""
    for piece in pieces(text.encode(), cuts):
        so_far += take(stream, piece)
        assert expected(text, stops)[0].startswith(so_far)


def test_nothing_is_held_without_need() -> None:
    stream = TextStream(["STOP"])
    assert take(stream, b"go on ") == "go on "
    assert take(stream, b"ST") == ""
    assert take(stream, b"ART") == "START"


def test_an_incomplete_character_is_dropped_at_the_end() -> None:
    stream = TextStream()
    assert take(stream, "a😀".encode()[:-1]) == "a"
    assert stream.finish() == []
    assert stream.text == "a"


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    stream = TextStream()
    assert take(stream, b"\xffa") == "\ufffda"


def test_control_tokens_are_read_by_their_names_where_they_mean_something() -> None:
    form = AnswerForm(calls=GENERIC, tools=("f",))
    stream = TextStream(form=form, marks={3: b"<tool_call>", 4: b"</tool_call>"})
    for token, piece in [(9, b""), (8, "é".encode()), (3, b""), (8, b'{"name": "f"}'), (4, b""), (9, b"")]:
        stream.take(token, piece)
    stream.finish()
    assert (stream.text, [(call.name, call.arguments) for call in stream.calls]) == ("é", [("f", "{}")])
