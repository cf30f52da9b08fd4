"""The wire contract: strict for users, tolerant inside, and the same after every journey."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from perllm.broker.errors import field_errors
from perllm.broker.messages import (
    MAX_DEADLINE,
    Claimed,
    Completed,
    Counters,
    Dispatched,
    Ended,
    Energy,
    Event,
    Heartbeat,
    NodeDown,
    NodeInfo,
    Receipt,
    Result,
    Returned,
    State,
    Submitted,
    TaskSpec,
    parse_event,
)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,20}", fullmatch=True)
texts = st.text(min_size=1, max_size=200)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "deadline": st.floats(1e-3, MAX_DEADLINE),
        "value": st.floats(1e-6, 1e6),
        "max_tokens": st.integers(1, 1_000_000),
        "model": names,
        "service": names,
        "tenant": names,
        "expected_tokens": st.integers(1, 1_000_000),
        "idempotency_key": texts,
        "metadata": st.dictionaries(st.text(max_size=64), st.text(max_size=512), max_size=16),
        "temperature": st.floats(0, 2),
        "top_k": st.integers(0, 2**31 - 1),
        "seed": st.integers(0, 2**32 - 1),
        "stop": st.lists(texts, max_size=16),
        "json_schema": st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    },
)
inputs = st.builds(lambda text: {"prompt": text}, texts) | st.builds(
    lambda turns: {"messages": [{"role": role, "content": text} for role, text in turns]},
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=50)), min_size=1),
)


@given(inputs, fields)
def test_a_task_survives_its_journey(given_input: dict[str, Any], given_fields: dict[str, Any]) -> None:
    """As it is stored: JSON, defaults left out."""
    spec = TaskSpec.model_validate(given_input | given_fields)
    assert TaskSpec.model_validate_json(spec.model_dump_json(exclude_defaults=True)) == spec


@given(st.text())
def test_a_preview_is_one_short_line(text: str) -> None:
    preview = TaskSpec(messages=({"role": "user", "content": text},)).preview(width=20)
    assert len(preview) <= 20
    assert len(preview.splitlines()) <= 1


def test_a_preview_shows_the_last_turn() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why  is\nthe sky blue?"}]
    assert TaskSpec.model_validate({"messages": turns}).preview() == "Why is the sky blue?"


DEEP: dict[str, Any] = {}
for _ in range(100_000):
    DEEP = {"a": DEEP}
LOOP: dict[str, Any] = {}
LOOP["a"] = LOOP


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": ""}, "prompt: "),
        ({"prompt": 5}, "prompt: "),
        ({"prompt": "\ud800"}, "prompt: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": ""}] * 5000}, "messages: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "x", "nickname": "y"}]}, "messages.0.nickname: "),
        ({}, "give exactly one of 'prompt', 'prompt_ids' and 'messages'"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "give exactly one of"),
        ({"prompt": "x", "colour": "blue"}, "colour: "),
        ({"prompt": "x", "deadline": 0}, "deadline: .*given 0"),
        ({"prompt": "x", "deadline": -1}, "deadline: "),
        ({"prompt": "x", "deadline": float("nan")}, "deadline: "),
        ({"prompt": "x", "deadline": float("inf")}, "deadline: "),
        ({"prompt": "x", "deadline": MAX_DEADLINE + 1}, "deadline: "),
        ({"prompt": "x", "start_after": -1}, "start_after: "),
        ({"prompt": "x", "start_after": MAX_DEADLINE, "deadline": MAX_DEADLINE}, "start_after: "),
        ({"prompt": "x", "start_after": 60}, "start_after, 60 s, is not before its deadline, 60 s"),
        ({"prompt": "x", "deadline": "tomorrow"}, "deadline: .*given 'tomorrow'"),
        ({"prompt": "x", "value": float("nan")}, "value: "),
        ({"prompt": "x", "value": "inf"}, "value: "),
        ({"prompt": "x", "value": 0}, "value: "),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens: "),
        ({"prompt": "x", "n": 17}, "n: "),
        ({"prompt": "x", "n": 16, "logprobs": 4}, "'n' times 'logprobs' \\+ 1 is above 64"),
        ({"prompt_ids": [-1]}, "prompt_ids.0: "),
        ({"prompt_ids": [2**31]}, "prompt_ids.0: "),
        ({"prompt": "x", "logit_bias": {7: 101}}, "logit_bias.7: "),
        ({"prompt_ids": [1], "suffix": "x"}, "'suffix' needs a 'prompt'"),
        ({"messages": [{"role": "user", "content": "x"}], "echo": True}, "'echo' needs a 'prompt' or 'prompt_ids'"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens: "),
        ({"prompt": "x", "max_tokens": 10**30}, "max_tokens: "),
        ({"prompt": "x", "top_k": 10**30}, "top_k: "),
        ({"prompt": "x", "model": "a b"}, "model: "),
        ({"prompt": "x", "model": "a\n"}, "model: "),
        ({"prompt": "x", "service": "x" * 129}, "service: "),
        ({"prompt": "x", "temperature": float("nan")}, "temperature: "),
        ({"prompt": "x", "stop": [""]}, "stop.0: "),
        ({"prompt": "x", "metadata": {"k": 5}}, "metadata.k: "),
        ({"prompt": "x", "metadata": {"k": "\ud800"}}, "metadata.k: "),
        ({"prompt": "x", "metadata": {str(n): "" for n in range(17)}}, "metadata: "),
        ({"prompt": "x", "idempotency_key": ""}, "idempotency_key: "),
        ({"prompt": "x", "json_schema": {"a": object()}}, "json_schema: is not JSON"),
        ({"prompt": "x", "json_schema": {"a": "\ud800"}}, "json_schema: is not JSON"),
        ({"prompt": "x", "json_schema": {"a": float("nan")}}, "json_schema: is not JSON"),
        ({"prompt": "x", "json_schema": {"a": "x" * 65_536}}, "json_schema: .*limit is 65536"),
        ({"prompt": "x", "json_schema": DEEP}, "json_schema: is nested deeper than 64 levels"),
        ({"prompt": "x", "json_schema": LOOP}, "json_schema: is nested deeper than 64 levels"),
        ({"prompt": "x", "json_schema": {}, "grammar": "root ::= x"}, "at most one of 'json_schema' and 'grammar'"),
    ],
)
def test_what_is_wrong_is_named(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TaskSpec.model_validate(bad)
    line = field_errors(caught.value)
    assert "\n" not in line
    assert len(line) < 300
    assert re.search(says, line), line


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        TaskSpec.model_validate({"prompt": "x", "deadline": -1, "value": -1, "colour": 1})
    assert [part.split(":")[0] for part in field_errors(caught.value).split("; ")] == ["deadline", "value", "colour"]


EVENTS: list[Event] = [
    Submitted(id="t", at=1.5, deadline=9.0, service="chat", expected_tokens=7),
    Dispatched(id="t", at=1.5, node="n", model="m", attempt=1),
    Claimed(id="t", at=1.5, node="n", attempt=1),
    Completed(
        id="t",
        at=1.5,
        node="n",
        attempt=1,
        state=State.SUCCEEDED,
        on_time=True,
        latency=1,
        queued=0.5,
        receipt=Receipt(node="n", model="m", attempt=1, energy=Energy(method="emulated", estimated=True)),
    ),
    Returned(id="t", at=1.5, node="n", attempt=1, cause="failed", reason="x", strikes=1),
    Ended(id="t", at=1.5, state=State.CANCELLED),
    NodeDown(at=1.5, node="n"),
    Heartbeat(at=1.5, node="n", boot="b", counters=Counters(steps=5), progress={"t": 3}),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: e.type)
def test_an_event_is_read_as_it_was_written_and_by_older_readers(event: Event) -> None:
    raw = json.loads(event.model_dump_json())
    assert parse_event(json.dumps(raw)) == event
    assert parse_event(json.dumps(raw | {"a_later_field": 1})) == event


@pytest.mark.parametrize(
    "raw", ["", "not JSON", "[]", "{}", '{"type":"of the future"}', '{"type":"claimed","id":"t"}', b"\xff"]
)
def test_no_event(raw: str | bytes) -> None:
    with pytest.raises(ValidationError):
        parse_event(raw)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("name", "a b"),
        ("name", ""),
        ("slots", 0),
        ("boot", ""),
        ("bandwidth", float("nan")),
        ("models", []),
        ("tier", "fog"),
    ],
)
def test_a_registration_that_is_nonsense(part: str, value: object) -> None:
    calibration = {"step": 0.01, "sequence": 0, "prefill": 0}
    info = {
        "name": "n",
        "tier": "edge",
        "boot": "b",
        "slots": 1,
        "models": [{"name": "m", "context": 1, "kv_tokens": 1, "calibration": calibration}],
        "power": {"idle": 1, "active": 1, "method": "emulated", "estimated": True},
        "bandwidth": 1,
        "engine": "none",
    }
    assert NodeInfo.model_validate(info).queue == "edge.n"
    with pytest.raises(ValidationError, match=part):
        NodeInfo.model_validate(info | {part: value})


def test_the_final_states() -> None:
    assert [s for s in State if s.final] == ["succeeded", "failed", "expired", "rejected", "cancelled"]


def test_a_result_without_output_has_no_text() -> None:
    assert Result(id="t", state=State.CANCELLED, on_time=False, latency=1).text == ""
