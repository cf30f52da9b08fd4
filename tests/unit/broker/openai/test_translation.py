"""The OpenAI Batch file format: every line is a request or one clear error, and results keep their order and ids."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Result, State, TaskSpec
from perllm.broker.openai import batch_file as batch
from perllm.broker.openai import translation
from perllm.broker.openai.responses import response_object
from perllm.broker.openai.translation import CHAT, COMPLETIONS, RESPONSES

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def line(custom_id: str = "a", **body: object) -> str:
    return json.dumps({"custom_id": custom_id, "body": {"prompt": "hi", **body}})


@given(st.lists(st.text() | json_values.map(json.dumps), max_size=8))
def test_any_text_gives_one_outcome_per_line_that_is_not_blank(lines: list[str]) -> None:
    outcomes = list(batch.read(lines))
    assert [o.number for o in outcomes] == [n for n, text in enumerate(lines, 1) if text.strip()]


@given(st.dictionaries(st.sampled_from([*TaskSpec.model_fields, "stop", "logprobs", "n", "nonsense"]), json_values))
def test_any_body_gives_fields_or_an_error(body: dict[str, object]) -> None:
    try:
        fields = batch.task_fields(body)
    except InvalidTask:
        return
    assert set(fields) <= set(TaskSpec.model_fields)


def test_a_chat_request_becomes_a_task() -> None:
    text = json.dumps(
        {
            "custom_id": "one",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [{"role": "user", "content": "hi"}],
                "max_completion_tokens": 7,
                "stop": "END",
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
                "user": "somebody",
            },
            "deadline": 5,
        }
    )
    (read,) = batch.read([text])
    assert isinstance(read, batch.Line)
    spec = TaskSpec.model_validate(read.fields)
    assert (spec.model, spec.max_tokens, spec.stop, spec.deadline) == ("m", 7, ("END",), 5)
    assert spec.json_schema == {"type": "object"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "custom_id"),
        ('{"custom_id": 3, "body": {}}', "custom_id"),
        ('{"custom_id": "a", "method": "GET", "body": {}}', "method"),
        ('{"custom_id": "a", "url": "/v1/audio/speech", "body": {}}', "url"),
        ('{"custom_id": "a"}', "body"),
        (line(response_format={"type": "xml"}), "response_format"),
        (line(tools=[{"type": "function"}]), "tools"),
    ],
)
def test_a_bad_line_names_what_is_wrong(text: str, named: str) -> None:
    (read,) = batch.read([text])
    assert isinstance(read, batch.BadLine)
    assert named in read.reason


def test_a_repeated_custom_id_is_an_error_of_the_later_line_only() -> None:
    first, second, third = batch.read([line("a"), line("a"), line("b")])
    assert isinstance(first, batch.Line)
    assert isinstance(third, batch.Line)
    assert isinstance(second, batch.BadLine)
    assert second.number == 2


def result(state: State) -> Result:
    succeeded = state is State.SUCCEEDED
    return Result(
        id="t-1",
        state=state,
        on_time=succeeded,
        latency=1.5,
        reason=None if succeeded else "because",
        output=make.output() if succeeded else None,
        receipt=make.receipt("one", tokens=3) if succeeded else None,
    )


def test_a_success_is_an_openai_response_with_energy_beside_the_usage() -> None:
    line = batch.Line(1, "mine", CHAT, {"prompt": "hi"})
    written = json.loads("".join(batch.output_line(line, result(State.SUCCEEDED), 0.0)))
    body = written["response"]["body"]
    assert written["custom_id"] == "mine"
    assert written["error"] is None
    assert body["choices"][0]["message"]["content"] == "some text"
    assert body["usage"]["completion_tokens"] == 3
    assert body["energy"]["total"] == pytest.approx(2.5)
    assert body["energy"]["estimated"] is True


@pytest.mark.parametrize("state", [State.FAILED, State.EXPIRED, State.REJECTED, State.CANCELLED])
def test_anything_else_is_an_error_with_its_reason(state: State) -> None:
    written = batch.failed_line(batch.Line(1, "mine", COMPLETIONS, {"prompt": "hi"}), result(state))
    assert written["response"] is None
    assert written["error"] == {"code": f"task_{state}", "message": "because"}


# --- bodies of requests


def asked(url: str, **body: object) -> TaskSpec:
    return TaskSpec.model_validate(translation.task_fields(body, url))


def test_content_in_parts_and_the_developers_role() -> None:
    parts = [{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky blue?"}]
    spec = asked(CHAT, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert [(m.role, m.content) for m in spec.messages or ()] == [
        ("system", "Be brief."),
        ("user", "Why is the sky blue?"),
    ]


def test_a_response_request_becomes_a_task() -> None:
    spec = asked(
        RESPONSES,
        model="auto",
        instructions="Be brief.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Hi."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
            {"role": "user", "content": "Again."},
        ],
        max_output_tokens=9,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        tools=[],
        tool_choice="auto",
        background=True,
    )
    assert spec.model is None
    assert [m.content for m in spec.messages or ()] == ["Be brief.", "Hi.", "Hello.", "Again."]
    assert spec.max_tokens == 9
    assert spec.json_schema == {"type": "object"}


@pytest.mark.parametrize(
    ("url", "body", "named"),
    [
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
            "messages.0.tool_calls.0",
        ),
        (CHAT, {"messages": "x"}, "messages"),
        (CHAT, {}, "messages"),
        (CHAT, {"prompt": "x"}, "prompt"),
        (CHAT, {"input": "x"}, "input"),
        (RESPONSES, {"input": "x", "prompt": "y"}, "prompt"),
        (RESPONSES, {"input": "x", "max_tokens": 5}, "max_tokens"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
        (RESPONSES, {"input": "x", "text": 5}, "text"),
        (RESPONSES, {"input": "x", "instructions": ["y"]}, "instructions"),
        (RESPONSES, {"input": [{"type": "function_call_output"}]}, "input.0.call_id"),
        (RESPONSES, {"input": 5}, "input"),
        (RESPONSES, {"input": "x", "previous_response_id": "y"}, "previous_response_id"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(url: str, body: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        translation.task_fields(body, url)
    assert str(caught.value).startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("deadline", "left"),
    [("30", 30.0), ("1.5", 1.5), ("1970-01-01T00:01:40Z", 90.0), ("1970-01-01T01:01:40+01:00", 90.0)],
)
def test_a_deadline_given_as_text(deadline: str, left: float) -> None:
    assert translation.seconds_left(deadline, 10.0) == left


@pytest.mark.parametrize("deadline", ["", "soon", "-5", "1e9", "nan", "1970-01-01T00:00:05Z", "1970-01-01T00:01:40"])
def test_a_deadline_that_has_passed_or_is_none(deadline: str) -> None:
    with pytest.raises(InvalidTask, match="deadline"):
        translation.seconds_left(deadline, 10.0)


@given(st.text(max_size=40))
def test_any_text_is_a_deadline_or_an_error(deadline: str) -> None:
    with suppress(InvalidTask):
        assert translation.seconds_left(deadline, 0.0) >= 0


@pytest.mark.parametrize("state", list(State))
def test_every_state_is_shown_as_a_response(state: State) -> None:
    final = state.final
    shown = response_object("id", TaskSpec(prompt="hi"), 1.0, state, result(state) if final else None)
    assert shown["status"] in ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
    assert (shown["error"] is not None) == (shown["status"] == "failed")
    assert (shown["incomplete_details"] is not None) == (shown["status"] == "incomplete")
