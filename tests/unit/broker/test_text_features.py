"""What of a text travels to the scheduler: bounded, the same everywhere, other for every tenant, harmless if spoilt."""

from __future__ import annotations

import base64
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.messages import Explanation, Influence, LengthForecast, TaskSpec
from perllm.broker.text_features import (
    DIGEST_BYTES,
    MAX_CODES,
    parse,
    sketch,
    sketch_task,
    with_words,
    words_by_code,
)

_ANY_TEXT = st.text(st.characters(codec=None), max_size=2000)


def codes(text: str, tenant: str = "default") -> list[int]:
    raw = parse(sketch([text], tenant))[DIGEST_BYTES:]
    return [int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)]


@given(st.lists(_ANY_TEXT, max_size=4), st.text(max_size=20))
def test_every_text_has_a_sketch_that_can_be_read_again(texts: list[str], tenant: str) -> None:
    told = sketch(texts, tenant)
    assert len(told) <= 184
    raw = parse(told)
    assert base64.b64encode(raw).decode() == told
    assert DIGEST_BYTES <= len(raw) <= DIGEST_BYTES + 2 * MAX_CODES
    assert sketch(texts, tenant) == told


@given(st.one_of(_ANY_TEXT, st.binary(max_size=300).map(lambda b: base64.b64encode(b).decode())))
def test_what_is_no_sketch_is_none(text: str) -> None:
    raw = parse(text)
    assert len(raw) % 2 == 0
    assert raw == b"" or (base64.b64encode(raw).decode() == text and len(raw) >= DIGEST_BYTES)


def test_it_is_the_same_in_every_process() -> None:
    code = "from perllm.broker.text_features import sketch; print(sketch(['Write a story of 500 words'], 'acme'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert told == sketch(["Write a story of 500 words"], "acme")


def test_a_long_text_costs_no_more_than_its_ends() -> None:
    start, end = "Summarise this report in one line . " * 8, " . Answer in French and be brief ." * 8
    short, long = codes(start + "x " * 500 + end), codes(start + "lorem ipsum " * 100_000 + end)
    assert short == long
    assert parse(sketch([start + "x " * 500 + end])) != parse(sketch([start + "y " * 500 + end]))  # the digest


def test_words_and_pairs_are_alike_where_texts_are_and_numbers_by_their_digits() -> None:
    assert codes("Write 500 words") == codes("write 300 WORDS") != codes("write 50 words")
    story, essay = set(codes("please write a story")), set(codes("now write a essay"))
    assert len(story & essay) == 3  # write, a, and both together
    assert len(set(codes("请写一个故事"))) == 11  # 6 characters, 5 pairs: there are no spaces to go by


def test_two_tenants_have_other_codes_for_the_same_words() -> None:
    text = "You are a detective in a town by the sea. Describe the scene."
    mine, yours = codes(text, "a"), codes(text, "b")
    assert sum(a == b for a, b in zip(mine, yours, strict=True)) <= 1
    assert parse(sketch([text], "a"))[:DIGEST_BYTES] != parse(sketch([text], "b"))[:DIGEST_BYTES]


def test_a_chats_first_and_last_turns_count_and_the_digest_tells_turns_apart() -> None:
    def of(*turns: str) -> bytes:
        return parse(sketch_task(TaskSpec(messages=tuple({"role": "user", "content": t} for t in turns))))

    assert of("You are terse.", "x", "Why?")[DIGEST_BYTES:] == of("You are terse.", "y", "Why?")[DIGEST_BYTES:]
    assert of("You are terse.", "x", "Why?") != of("You are terse.", "y", "Why?")
    assert of("ab", "c")[:DIGEST_BYTES] != of("a", "bc")[:DIGEST_BYTES]


def test_an_explanation_names_the_words() -> None:
    spec = TaskSpec(prompt="Write a story about the sea", tenant="acme", json_schema={"type": "object"})
    named = words_by_code(spec)
    assert set(named.values()) >= {"write", "story", "a story", "the sea"}
    assert any(words.startswith("json_schema") for words in named.values())
    code = next(c for c, words in named.items() if words == "a story")
    length = LengthForecast(median=100, most=300, source="text", because=(Influence(code=code, factor=2.0),))
    why = with_words(Explanation(policy="p", action="dispatch", sentence="", length=length), spec)
    assert why.length is not None
    assert [(i.words, i.factor) for i in why.length.because] == [("a story", 2.0)]
