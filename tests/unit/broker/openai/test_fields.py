"""Every field that the official client knows is listed, and the door does with it what the list says."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types import batch_create_params, completion_create_params, embedding_create_params, file_create_params
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import ResponseInputItemParam, ToolParam, response_create_params
from openai.types.shared_params import FunctionDefinition

from perllm.broker.api.openapi.fields import NUMBERS, OTHERS, TEXT, markdown
from perllm.broker.errors import InvalidTask
from perllm.broker.messages import TaskSpec
from perllm.broker.openai import items, tools, translation, turns
from perllm.broker.openai.embeddings import EMBEDDINGS, RERANK
from perllm.broker.openai.requests import Ignored, Refused, marked
from perllm.broker.openai.translation import CHAT, COMPLETIONS, RESPONSES

URLS = {
    "chat": CHAT,
    "completions": COMPLETIONS,
    "responses": RESPONSES,
    "embeddings": EMBEDDINGS,
    "rerank": RERANK,
}
MODELS = {**TEXT, **NUMBERS}
#: What the official client can say.
KNOWN: dict[str, Any] = {
    "chat": chat_create_params.CompletionCreateParamsStreaming,
    "completions": completion_create_params.CompletionCreateParamsStreaming,
    "responses": response_create_params.ResponseCreateParamsStreaming,
    "embeddings": embedding_create_params.EmbeddingCreateParams,
}
BASE: dict[str, dict[str, Any]] = {
    "chat": {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "a"}}],
    },
    "completions": {"prompt": "hi"},
    "responses": {"input": "hi", "tools": [{"type": "function", "name": "a"}]},
    "embeddings": {"input": "hi"},
    "rerank": {"query": "hi", "documents": ["ho"]},
}
SCHEMA = {"type": "object", "properties": {}}
#: For every field that is taken, something it takes and that is not the usual.
TAKEN: dict[str, Any] = {
    "allowed_tools": ["a"],
    "background": True,
    "background_options": {"completion_window": "2h"},
    "best_of": 1,
    "chat_template_kwargs": {"enable_thinking": False},
    "deadline": 5,
    "dimensions": 3,
    "documents": ["a", {"text": "b"}],
    "echo": True,
    "encoding_format": "base64",
    "expected_tokens": 5,
    "frequency_penalty": 0.5,
    "function_call": {"name": "a"},
    "functions": [{"name": "a"}],
    "grammar": 'root ::= "a"',
    "guided_choice": ["a", 'b"'],
    "guided_grammar": 'root ::= "a"',
    "guided_json": SCHEMA,
    "include": ["message.output_text.logprobs"],
    "input": [{"role": "user", "content": "ho"}],
    "instructions": "Be brief.",
    "json_schema": SCHEMA,
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "max_completion_tokens": 5,
    "max_output_tokens": 5,
    "max_tokens": 5,
    "messages": [{"role": "user", "content": "ho"}],
    "metadata": {"a": "b"},
    "min_p": 0.5,
    "model": "m",
    "n": 2,
    "parallel_tool_calls": False,
    "presence_penalty": 0.5,
    "previous_response_id": "r",
    "prompt": "ho",
    "query": "ho",
    "return_documents": False,
    "reasoning": {"effort": "low"},
    "reasoning_effort": "max",
    "repeat_penalty": 1.5,
    "repetition_penalty": 1.5,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "seed": -1,
    "service": "s",
    "stop": "\n",
    "stream": True,
    "stream_options": {"include_usage": True},
    "structured_outputs": {"choice": ["a"]},
    "suffix": "ha",
    "temperature": 0.5,
    "text": {"format": {"type": "json_object"}},
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "b", "parameters": SCHEMA, "strict": True}}],
    "top_k": 5,
    "top_n": 1,
    "top_logprobs": 3,
    "top_p": 0.5,
    "value": 2.0,
}
#: Fields that say how to answer, and make no other task.
HOW = {"best_of", "encoding_format", "return_documents", "stream", "stream_options", "top_n"}


def fields_of(endpoint: str) -> list[tuple[str, str]]:
    return [(endpoint, name) for name in MODELS[endpoint].model_fields]


EVERY = [pair for endpoint in MODELS for pair in fields_of(endpoint)]


def task(endpoint: str, body: dict[str, Any]) -> TaskSpec:
    if endpoint == "responses":
        before = [{"role": "user", "content": "before"}] if body.get("previous_response_id") else []
        fields = translation.responses.fields(body, before)
    else:
        fields = translation.task_fields(body, URLS[endpoint])
    return TaskSpec.model_validate(fields)


def test_the_documents_table_is_this_one() -> None:
    page = (Path(__file__).parents[4] / "docs" / "http-api.md").read_text(encoding="utf-8")
    assert markdown() in page, "make it again: perllm api fields"


@pytest.mark.parametrize("endpoint", KNOWN)
def test_every_field_the_official_client_knows_is_listed(endpoint: str) -> None:
    unlisted = set(typing.get_type_hints(KNOWN[endpoint])) - set(MODELS[endpoint].model_fields)
    assert unlisted == set()


def test_every_field_of_files_and_batches_is_listed() -> None:
    uploads = set(typing.get_type_hints(file_create_params.FileCreateParams))
    assert uploads <= {name.partition("[")[0] for name in OTHERS["Files"]}
    assert set(typing.get_type_hints(batch_create_params.BatchCreateParams)) <= set(OTHERS["Batches"])


@pytest.mark.parametrize(("endpoint", "name"), EVERY)
def test_the_door_does_what_the_list_says(endpoint: str, name: str) -> None:
    (mark,) = (mark for each, mark, _ in marked(MODELS[endpoint]) if each == name)
    base = {k: v for k, v in BASE[endpoint].items() if name not in ("functions", "function_call") or k != "tools"}
    usual = task(endpoint, base)
    match mark:
        case Ignored():
            for value in (True, "x", {"a": 1}, None):
                assert task(endpoint, {**base, name: value}) == usual
        case Refused(sentence=sentence):
            with pytest.raises(InvalidTask) as caught:
                task(endpoint, {**base, name: {"a": 1}})
            assert str(caught.value) == f"{name}: {sentence}"
            for value in (None, *mark.usual):
                assert task(endpoint, {**base, name: value}) == usual
        case None:
            assert task(endpoint, {**base, name: None} if name not in base else base) == usual
            more = {"functions": TAKEN["functions"]} if name == "function_call" else {}
            taken = ["a", "b"] if (endpoint, name) == ("embeddings", "input") else TAKEN[name]
            made = task(endpoint, {**base, **more, name: taken})
            assert (made == usual) == (name in HOW)


@pytest.mark.parametrize(("endpoint", "name"), EVERY)
def test_every_field_says_what_it_is(endpoint: str, name: str) -> None:
    (text,) = (text for each, _, text in marked(MODELS[endpoint]) if each == name)
    assert len(text) > 5
    assert "|" not in text


# --- within fields


def members(union: Any) -> list[Any]:
    """The typed dictionaries in a union."""
    inner = typing.get_args(union)
    return [each for one in inner for each in (members(one) if typing.get_args(one) else [one])]


def test_every_field_of_the_official_clients_messages_is_taken_or_refused_by_its_own_sentence() -> None:
    for kind in members(ChatCompletionMessageParam):
        for name in typing.get_type_hints(kind):
            said = ""
            try:
                turns.turn({"role": "user", "content": "hi", name: "assistant" if name == "role" else "x"}, "m")
            except InvalidTask as error:
                said = str(error)
            assert "not a field" not in said, name


def test_every_field_of_the_official_clients_functions_is_taken() -> None:
    (flat,) = (kind for kind in members(ToolParam) if kind.__name__ == "FunctionToolParam")
    values = {"name": "a", "type": "function", "parameters": {}, "strict": True, "description": "d"}
    for form in (FunctionDefinition, flat):
        given = {name: values.get(name, True) for name in typing.get_type_hints(form)}
        assert tools.tools([{"type": "function", **given}])
        assert tools.tools([{"type": "function", "function": {k: v for k, v in given.items() if k != "type"}}])


def test_every_other_kind_of_tool_is_refused_in_a_sentence() -> None:
    for kind in members(ToolParam):
        (name, *_) = typing.get_args(typing.get_type_hints(kind)["type"])
        if name != "function":
            with pytest.raises(InvalidTask, match=r"^tools\.0\.type: .*not supported"):
                tools.tools([{"type": name}])


def test_every_kind_of_item_is_taken_or_refused_in_a_sentence() -> None:
    taken = {
        "message": {"role": "user", "content": "x"},
        "function_call": {"call_id": "c", "name": "a", "arguments": "{}"},
        "function_call_output": {"call_id": "c", "output": "x"},
        "reasoning": {"id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    }
    for kind in members(ResponseInputItemParam):
        hint = typing.get_type_hints(kind).get("type")
        name = next((n for n in typing.get_args(hint) if isinstance(n, str)), "message") if hint else "message"
        if name in taken:
            assert items.input_turns([{"type": name, **taken[name]}], known=["c"])
        elif name != "item_reference":  # which is looked up
            with pytest.raises(InvalidTask, match=rf"^input\.0: items of type '{name}' are not supported"):
                items.input_turns([{"type": name}])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "images"),
        ({"type": "input_image", "image_url": "x"}, "images"),
        ({"type": "input_audio", "input_audio": {}}, "audio"),
        ({"type": "file", "file": {}}, "files"),
        ({"type": "input_file", "file_id": "x"}, "files"),
        ({"type": "text"}, "'text'"),
        ("x", "'text'"),
    ],
)
def test_a_part_that_is_no_text_is_refused_in_a_sentence(part: Any, words: str) -> None:
    with pytest.raises(InvalidTask, match=r"^messages\.0\.content\.0: ") as caught:
        turns.turns([{"role": "user", "content": [part]}])
    assert words in str(caught.value)
