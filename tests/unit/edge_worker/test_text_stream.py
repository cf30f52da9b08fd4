"""Text out of token pieces: UTF-8 is never split, stop strings are found across token borders."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from perllm.edge_worker.text_stream import TextStream

#: A small alphabet makes stop strings overlap and repeat; 😀 and é are cut by the pieces.
TEXT = st.text(alphabet="ab\né😀", max_size=30)
STOPS = st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3)


def pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(raw), *(c % (len(raw) + 1) for c in cuts)})
    return [raw[a:b] for a, b in pairwise(borders)]


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
    released = [stream.push(piece) for piece in pieces(text.encode(), cuts)]
    released.append(stream.finish())
    want, stopped = expected(text, stops)
    assert "".join(released) == stream.text == want
    assert stream.stopped == stopped


@given(TEXT, STOPS, st.lists(st.integers(0, 200), max_size=20))
def test_what_is_released_is_never_taken_back(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = TextStream(stops)
    so_far = ""
    for piece in pieces(text.encode(), cuts):
        so_far += stream.push(piece)
        assert expected(text, stops)[0].startswith(so_far)


def test_nothing_is_held_without_need() -> None:
    stream = TextStream(["STOP"])
    assert stream.push(b"go on ") == "go on "
    assert stream.push(b"ST") == ""
    assert stream.push(b"ART") == "START"


def test_an_incomplete_character_is_dropped_at_the_end() -> None:
    stream = TextStream()
    assert stream.push("a😀".encode()[:-1]) == "a"
    assert stream.finish() == ""
    assert stream.text == "a"


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    stream = TextStream()
    assert stream.push(b"\xffa") == "\ufffda"
