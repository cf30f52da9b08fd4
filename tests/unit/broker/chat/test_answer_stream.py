"""What models write is taken apart the same way however it is cut into pieces, and no half of a mark is ever said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perllm.broker.chat.forms import CALL_FORMS, GENERIC, THOUGHT_FORMS, AnswerForm, CallForm, ThoughtForm
from perllm.broker.chat.stream import AnswerStream
from perllm.broker.messages import Delta

THINK = ThoughtForm("<think>", "</think>")
FORMS = {form.family: form for form in CALL_FORMS}
NAMES = ("get_weather", "a", "all.b")


def written(form: CallForm, calls: Iterable[tuple[str, str]]) -> str:
    """Calls (name, arguments) as a model of this family writes them."""
    if form.kind == "named":
        one = [f"{form.opening}{name}{form.separator}{arguments}{form.closing}" for name, arguments in calls]
        return (form.between or "").join(one)
    objects = [f'{{"name": {json.dumps(name)}, "{form.key}": {arguments}}}' for name, arguments in calls]
    if form.listed:
        return f"{form.opening}[{', '.join(objects)}]"
    return (form.between or "").join(f"{form.opening}{form.space}{o}{form.space}{form.closing}" for o in objects)


def cut(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in pairwise(borders)]


def said(deltas: Iterable[Delta]) -> dict[str, Any]:
    """What a client puts together of the pieces."""
    text, reasoning, calls = "", "", list[list[str]]()
    for delta in deltas:
        assert sum(map(bool, (delta.text, delta.reasoning, delta.call is not None))) == 1
        text, reasoning = text + delta.text, reasoning + delta.reasoning
        if delta.call is not None:
            if delta.name is not None:
                assert delta.call == len(calls)
                assert delta.id
                calls.append([delta.name, ""])
            assert delta.call == len(calls) - 1
            calls[delta.call][1] += delta.arguments
    return {"text": text, "reasoning": reasoning, "calls": [tuple(call) for call in calls]}


def through(form: AnswerForm, pieces: Iterable[str], *, stops: Sequence[str] = (), interrupted: bool = False) -> Any:
    """(the stream at its end, what its pieces say)."""
    stream = AnswerStream(form, stops, seed="task")
    deltas = [delta for piece in pieces for delta in stream.push(piece)]
    deltas += stream.finish(cut=interrupted)
    pieced = said(deltas)
    assert pieced["text"] == stream.text
    assert pieced["reasoning"] == (stream.reasoning or "")
    assert pieced["calls"] == [(call.name, call.arguments) for call in stream.calls]
    return stream, pieced


#: Text in which marks begin, end, and nest.
BITS = [
    *'ab{}[],:"\\ \n<>',
    *(mark for form in CALL_FORMS for mark in (form.opening, form.closing, form.separator, *form.dropped) if mark),
    *(mark for form in THOUGHT_FORMS for mark in (form.opening, form.closing)),
    *("<tool_", "call>", '{"name": "a"', '"arguments": {', '"parameters":', '"get_weather"', "}}", '{"x": "}{<"}'),
    "😀",
]
MESS = st.lists(st.sampled_from(BITS) | st.text(max_size=3), max_size=25).map("".join)
VALUES = st.recursive(st.none() | st.integers() | st.text(), lambda values: st.lists(values, max_size=3))
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
STOPS = st.lists(st.sampled_from(["ab", "}", "<tool", "\n\n"]), max_size=2)
CUTS = st.lists(st.integers(0, 2000), max_size=40)


def forms(draw: st.DrawFn) -> AnswerForm:
    calls = draw(st.sampled_from([None, *CALL_FORMS]))
    thought = draw(st.sampled_from([None, *THOUGHT_FORMS]))
    return AnswerForm(
        thought=thought,
        thinking=thought is not None and draw(st.booleans()),
        calls=calls,
        naming=calls is not None and calls.kind == "named" and draw(st.booleans()),
        tools=NAMES,
        dropped=calls.dropped if calls else (),
    )


FORM = st.composite(forms)()


@given(FORM, MESS, CUTS, STOPS, st.booleans())
def test_any_cut_gives_the_same(
    form: AnswerForm, mess: str, cuts: list[int], stops: list[str], interrupted: bool
) -> None:
    one, whole = through(form, [mess], stops=stops, interrupted=interrupted)
    other, pieced = through(form, cut(mess, cuts), stops=stops, interrupted=interrupted)
    assert whole == pieced
    assert one.finish_reason("stop") == other.finish_reason("stop")
    if one.finish_reason("stop") == "tool_calls":
        assert all(isinstance(json.loads(call.arguments), dict) for call in one.calls)
    third, _ = through(form, list(mess), stops=stops, interrupted=interrupted)
    assert third.extent >= len(third.text)


@given(FORM, MESS, CUTS)
def test_nothing_is_lost_without_calls_and_thoughts(form: AnswerForm, mess: str, cuts: list[int]) -> None:
    stream, pieced = through(form, cut(mess, cuts))
    if not stream.calls and stream.reasoning is None and not form.dropped and not form.naming:
        assert pieced["text"] == mess


@given(
    st.sampled_from(CALL_FORMS),
    st.sampled_from([None, *THOUGHT_FORMS]),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3),
    st.sampled_from(["", "Let me look.", "a < b [ {"]),
    CUTS,
)
@example(FORMS["hermes"], THINK, False, [("a", {"x": '</tool_call>{"}\\'})], "", [])
def test_what_a_model_writes_is_read_back(
    form: CallForm,
    thought: ThoughtForm | None,
    thinking: bool,
    calls: list[tuple[str, Any]],
    before: str,
    cuts: list[int],
) -> None:
    if form.between is None:
        calls = calls[:1]
    if form.bare or form.text_name:
        before = ""
    raw = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = f"{before}\n{written(form, raw)}\n" if before else written(form, raw)
    if thought is not None:
        text = f"{'' if thinking else thought.opening}\nIs it {form.opening} so?\n{thought.closing}\n\n{text}"
    answer = AnswerForm(thought, thought is not None and thinking, form, False, NAMES, form.dropped)
    stream, pieced = through(answer, cut(text, cuts))
    assert pieced == {
        "text": before,
        "reasoning": f"Is it {form.opening} so?" if thought is not None else "",
        "calls": raw,
    }
    assert stream.finish_reason("stop") == "tool_calls"
    assert stream.finish_reason("length") == "length"
    assert len({call.id for call in stream.calls}) == len(raw)


HERMES = AnswerForm(THINK, False, GENERIC, False, NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>', None),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', None),
        ("<tool_call>get_weather</tool_call>", None),
        ('<tool_call><tool_call>{"name": "a", "arguments": {}}</tool_call>', ("<tool_call>", [("a", "{}")])),
        ('<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', ("", [("a", '{"x": 1}')])),
        ('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', ("", [("a", '{"x": 1}')])),
        ('<tool_call>{"name": "a"}</tool_call> Done.', (" Done.", [("a", "{}")])),
        ('<tool_call>{"name": "a", "id": 7.5, "arguments": null}', ("", [("a", "{}")])),
        ('<tool_call>{"name": "\\u0061", "arguments": {"x": "\\ud83d }"}}', ("", [("a", '{"x": "\\ud83d }"}')])),
        ('{"name": "a", "arguments": {}}', None),
        ("no <tool_", None),
    ],
)  # fmt: skip
def test_what_is_a_call_and_what_is_text(text: str, expected: tuple[str, list[tuple[str, str]]] | None) -> None:
    _, pieced = through(HERMES, list(text))
    assert (pieced["text"], pieced["calls"]) == (expected or (text, []))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One <tool_c", ("One ", [])),
        ("One <tool_call>\n", ("One", [])),
        ('One <tool_call>\n{"name": "get_wea', ("One", [])),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Par', ("", [("get_weather", '{"city": "Par')])),
        ('<tool_call>{"name": "a", "arguments": {}}</tool_ca', ("", [("a", "{}")])),
    ],
)
def test_what_was_cut_off_is_reported_as_far_as_it_goes(text: str, expected: tuple[str, list[tuple[str, str]]]) -> None:
    stream, pieced = through(HERMES, list(text), interrupted=True)
    assert (pieced["text"], pieced["calls"]) == expected
    assert stream.finish_reason("length") == "length"


def test_arguments_that_are_no_json_do_not_end_as_tool_calls() -> None:
    stream, _ = through(HERMES, ['<tool_call>{"name": "a", "arguments": {x: 1}}</tool_call>'])
    assert stream.finish_reason("stop") == "stop"


def test_stop_strings_end_the_text_and_neither_thoughts_nor_calls() -> None:
    call = '<tool_call>{"name": "a", "arguments": {"x": "STOP"}}</tool_call>'
    stream, pieced = through(HERMES, list(f"<think>STOP</think>Go {call}STOP and"), stops=["STOP"])
    assert pieced == {"text": "Go", "reasoning": "STOP", "calls": [("a", '{"x": "STOP"}')]}
    assert stream.stopped


def test_a_thought_without_an_end_is_all_there_is() -> None:
    for form, text in ((HERMES, "<think>on and on"), (AnswerForm(THINK, True), "on and on")):
        stream, pieced = through(form, list(text), interrupted=True)
        assert pieced == {"text": "", "reasoning": "on and on", "calls": []}
        assert stream.reasoning_tokens == len(text)


def test_tokens_of_a_thought_are_counted() -> None:
    stream = AnswerStream(AnswerForm(THINK))
    for token in ["<th", "ink", ">", "Hm", ".", "</", "think", ">\n\n", "Yes", "."]:
        stream.push(token)
    assert stream.reasoning_tokens == 8
    stream = AnswerStream(AnswerForm(THINK))
    for token in ["<th", "at", " is"]:
        stream.push(token)
    stream.finish()
    assert (stream.text, stream.reasoning, stream.reasoning_tokens) == ("<that is", None, 0)


def test_ids_are_the_same_at_a_second_attempt_and_differ_within_one() -> None:
    text = '<tool_call>{"name": "a"}</tool_call>' * 2
    first, again, other = (AnswerStream(HERMES, seed=seed) for seed in ("x", "x", "y"))
    for stream in (first, again, other):
        stream.push(text)
    ids = [[call.id for call in stream.calls] for stream in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0])) == 2
