"""Requests for embeddings and ranks, as tasks; their results, as bodies made in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import make

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import MAX_INPUTS, Output, Result, State, TaskSpec
from perllm.broker.openai import batch_file as batch
from perllm.broker.openai.embeddings import EMBEDDINGS, RERANK, form, in_their_words, response_pieces, task_fields
from perllm.broker.vectors import as_json, pack, unpack

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def result(output: Output) -> Result:
    return Result(
        id="t-1", state=State.SUCCEEDED, on_time=True, latency=1.5, output=output, receipt=make.receipt("one")
    )


def body_of(url: str, output: Output, spec: TaskSpec, **asked: Any) -> dict[str, Any]:
    pieces = list(response_pieces(url, result(output), spec, form(asked, url), {"node": "one"}))
    return dict(json.loads("".join(pieces)))


# --- vectors


@given(st.lists(FLOATS, max_size=50))
def test_a_vector_is_the_same_however_it_travels(numbers: list[float]) -> None:
    assert unpack(pack(numbers)).tolist() == numbers
    assert unpack(pack(json.loads(as_json(unpack(pack(numbers)))))).tolist() == numbers


@pytest.mark.parametrize("text", ["x", "AAA", "AAAA", "!!!!", "é"])
def test_what_is_no_vector_is_not_read_as_one(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack(text)


# --- requests


@pytest.mark.parametrize(
    ("given_", "fields"),
    [
        ("a", {"inputs": ["a"]}),
        (["a", "b"], {"inputs": ["a", "b"]}),
        ([1, 2], {"input_ids": [[1, 2]]}),
        ([[1, 2], [3]], {"input_ids": [[1, 2], [3]]}),
    ],
)
def test_every_form_of_input_is_a_task(given_: Any, fields: dict[str, Any]) -> None:
    body = {"input": given_, "model": "auto", "user": "me", "dimensions": 3, "encoding_format": "base64"}
    assert task_fields(body, EMBEDDINGS) == {"kind": "embed", "dimensions": 3, **fields}
    spec = TaskSpec.model_validate(task_fields(body, EMBEDDINGS))
    assert spec.needs() == ("embeddings", "tokens") if "input_ids" in fields else ("embeddings",)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input: "),
        ({"input": []}, "input: "),
        ({"input": {"text": "a"}}, "input: "),
        ({"input": ["a", ""]}, "input.1: is empty"),
        ({"input": ["a", 3]}, "input.1: "),
        ({"input": [3, "a"]}, "input.0: "),
        ({"input": [True]}, "input.0: "),
        ({"input": [[1], []]}, "input.1: is empty"),
        ({"input": [[1], [-1]]}, "input.1: a token"),
        ({"input": [1, 2**31]}, "input.0: a token"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input: 2049 inputs"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format: "),
        ({"input": "a", "prompt": "b"}, "prompt: not a field"),
    ],
)
def test_a_wrong_input_is_named(body: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidTask) as error:
        task_fields(body, EMBEDDINGS)
    assert str(error.value).startswith(said)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8))
def test_no_input_is_taken_that_is_no_task_or_fails_otherwise(given_: Any) -> None:
    try:
        fields = task_fields({"input": given_}, EMBEDDINGS)
    except InvalidTask as error:
        assert str(error).startswith("input")  # noqa: PT017
    else:
        TaskSpec.model_validate(fields)


def test_a_rerank_is_a_task() -> None:
    body = {"query": "why", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": False}
    assert task_fields(body, RERANK) == {"kind": "rerank", "query": "why", "inputs": ["a", "b"]}
    for wrong, field in (
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", {"title": "b"}]}, "documents.1"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": True}, "top_n"),
        ({"return_documents": 1}, "return_documents"),
    ):
        with pytest.raises(InvalidTask, match=f"^{field}: "):
            task_fields({**body, **wrong}, RERANK)


def test_what_is_wrong_with_the_task_is_said_in_the_requests_words() -> None:
    assert in_their_words("inputs: input 3 is long", EMBEDDINGS) == "input: input 3 is long"
    assert in_their_words("input_ids.1.2: no", EMBEDDINGS) == "input.1.2: no"
    assert in_their_words("inputs: too many", RERANK) == "documents: too many"
    assert in_their_words("deadline: inputs", EMBEDDINGS) == "deadline: inputs"


# --- responses


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=30))
def test_embeddings_come_in_order_as_numbers_or_packed(vectors: list[list[float]]) -> None:
    output = Output(text="", finish_reason="stop", vectors=tuple(map(pack, vectors)))
    spec = TaskSpec(kind="embed", inputs=("a",))
    body = body_of(EMBEDDINGS, output, spec)
    assert [(item["object"], item["index"]) for item in body["data"]] == [("embedding", i) for i in range(len(vectors))]
    assert [unpack(pack(item["embedding"])).tolist() for item in body["data"]] == vectors
    packed = body_of(EMBEDDINGS, output, spec, encoding_format="base64")
    assert [unpack(item["embedding"]).tolist() for item in packed["data"]] == vectors
    assert (body["object"], body["id"], body["node"]) == ("list", "t-1", "one")
    assert set(body["usage"]) == {"prompt_tokens", "total_tokens"}


def test_a_large_answer_comes_in_pieces() -> None:
    output = Output(text="", finish_reason="stop", vectors=(pack([0.1] * 4096),) * 40)
    pieces = list(
        response_pieces(EMBEDDINGS, result(output), TaskSpec(kind="embed", inputs=("a",)), form({}, EMBEDDINGS), {})
    )
    assert len(pieces) > 20
    assert max(map(len, pieces)) < 100_000
    assert len(json.loads("".join(pieces))["data"]) == 40


def test_ranks_are_best_first_with_their_documents() -> None:
    spec = TaskSpec(kind="rerank", query="why", inputs=("a", "b", "c"))
    output = Output(text="", finish_reason="stop", scores=(0.5, -1.0, 2.0))
    assert body_of(RERANK, output, spec)["results"] == [
        {"index": 2, "relevance_score": 2.0, "document": {"text": "c"}},
        {"index": 0, "relevance_score": 0.5, "document": {"text": "a"}},
        {"index": 1, "relevance_score": -1.0, "document": {"text": "b"}},
    ]
    few = body_of(RERANK, output, spec, top_n=1, return_documents=False)["results"]
    assert few == [{"index": 2, "relevance_score": 2.0}]


def test_a_line_of_a_batch_is_answered_as_it_asked() -> None:
    asked = {"custom_id": "é", "url": EMBEDDINGS, "body": {"input": ["a"], "encoding_format": "base64"}, "deadline": 9}
    (line,) = batch.read([json.dumps(asked)])
    assert isinstance(line, batch.Line)
    assert line.fields == {"kind": "embed", "inputs": ["a"], "deadline": 9}
    output = Output(text="", finish_reason="stop", vectors=(pack([0.5]),))
    written = json.loads("".join(batch.output_line(line, result(output), 0.0)))
    assert (written["custom_id"], written["error"], written["response"]["status_code"]) == ("é", None, 200)
    assert written["response"]["body"]["data"][0]["embedding"] == pack([0.5])
