"""The official client's whole language against the API: tools, several answers, reasoning; live, streamed, continued,
in batches. What the engine would say is written by the test (`support/scripted_node.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from support.api import ApiProcess
from support.scripted_node import ScriptedNode
from support.wait import eventually

from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Choice, Delta, Output, TaskSpec, ToolCall

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Rome and in Oslo?"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
FLAT: list[Any] = [{"type": "function", **WEATHER}]
PLACES = ("Rome", "Oslo")
CALLS = tuple(
    ToolCall(id=f"call_{place}", name="get_weather", arguments=json.dumps({"place": place})) for place in PLACES
)


def weather(spec: TaskSpec) -> tuple[Sequence[Delta], Output]:
    """A model that asks for the weather of both places, then tells it; without tools it says what it was asked."""
    turns = spec.messages or ()
    told = [turn.content for turn in turns if turn.role == "tool"]
    if told:
        text = f"It is {' and '.join(map(str, told))}."
        return [Delta(text=text[:5]), Delta(text=text[5:])], Output(text=text, finish_reason="stop")
    if spec.offered_tools:
        pieces = [Delta(reasoning="Two "), Delta(reasoning="places."), Delta(text="Let me look.")]
        for number, call in enumerate(CALLS):
            pieces += [
                Delta(call=number, id=call.id, name=call.name),
                Delta(call=number, arguments=call.arguments[:6]),
                Delta(call=number, arguments=call.arguments[6:]),
            ]
        return pieces, Output(
            text="Let me look.", finish_reason="tool_calls", reasoning="Two places.", tool_calls=CALLS
        )
    asked = spec.prompt or " ".join(map(str, spec.prompt_ids or ())) or str(turns[-1].content)
    texts = [f"{number}: {asked}" for number in range(spec.n)]
    more = tuple(Choice(text=text, finish_reason="length") for text in texts[1:])
    pieces = [Delta(index=number, text=text[:3]) for number, text in enumerate(texts)]
    return pieces, Output(text=texts[0], finish_reason="stop", more=more)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("calls")
    with EmbeddedServer(folder) as server, ScriptedNode(server.url, weather), ApiProcess(server.url, folder) as running:
        eventually(lambda: running.http().get("/ready").status_code == 200, "it is ready")
        yield running


@pytest.fixture(scope="module")
def client(api: ApiProcess) -> OpenAI:
    return api.openai()


def answered(calls: Any) -> list[dict[str, Any]]:
    """The tool's turns that answer these calls."""
    return [
        {"role": "tool", "tool_call_id": c.id, "content": f"hot in {json.loads(c.function.arguments)['place']}"}
        for c in calls
    ]


# --- chat completions


def test_a_chat_calls_tools_and_goes_on_with_their_answers(client: OpenAI) -> None:
    first = client.chat.completions.create(model="auto", messages=ASK, tools=TOOLS, tool_choice="required")
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [c.function.name for c in choice.message.tool_calls or ()] == ["get_weather"] * 2
    assert (choice.message.model_extra or {})["reasoning_content"] == "Two places."
    assert first.usage is not None
    assert first.usage.completion_tokens_details is not None
    assert first.usage.completion_tokens_details.reasoning_tokens == 2
    turns = [*ASK, choice.message, *answered(choice.message.tool_calls)]
    second = client.chat.completions.create(model="auto", messages=turns, tools=TOOLS)
    assert second.choices[0].message.content == "It is hot in Rome and hot in Oslo."


def test_a_streamed_chat_gives_the_same(client: OpenAI) -> None:
    class GetWeather(BaseModel):
        place: str

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    with client.chat.completions.stream(model="auto", messages=ASK, tools=[tool]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert kinds.count("tool_calls.function.arguments.done") == 2
    parsed = [call.function.parsed_arguments for call in message.tool_calls or ()]
    assert parsed == [GetWeather(place=place) for place in PLACES]
    assert [call.id for call in message.tool_calls or ()] == [call.id for call in CALLS]
    assert (message.model_extra or {})["reasoning_content"] == "Two places."
    again = client.chat.completions.create(
        model="auto", messages=[*ASK, message.to_dict(), *answered(message.tool_calls)], tools=TOOLS, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in again).startswith("It is hot in Rome")


def test_the_choice_among_tools_is_the_tasks(api: ApiProcess, client: OpenAI) -> None:
    chosen: list[tuple[Any, tuple[str, tuple[str, ...]]]] = [
        ("auto", ("auto", ())),
        ("none", ("none", ())),
        ("required", ("required", ())),
        ({"type": "function", "function": {"name": "get_weather"}}, ("required", ("get_weather",))),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS}},
            ("auto", ("get_weather",)),
        ),
    ]
    for given, meant in chosen:
        done = client.chat.completions.create(model="auto", messages=ASK, tools=TOOLS, tool_choice=given)
        record = api.ledger.task(done.id)
        assert record is not None
        assert (record.spec.tool_choice, record.spec.allowed_tools) == meant
        assert (done.choices[0].finish_reason == "tool_calls") == (given != "none")


def test_functions_in_the_older_form_are_called_in_it(client: OpenAI) -> None:
    function = {name: WEATHER[name] for name in ("name", "description", "parameters")}
    asked: dict[str, Any] = {"model": "auto", "messages": ASK, "functions": [function], "function_call": "auto"}
    first = client.chat.completions.create(**asked)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "function_call"
    assert message.function_call is not None
    assert message.tool_calls is None
    chunks = list(client.chat.completions.create(**asked, stream=True))
    calls = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert "".join(call.arguments or "" for call in calls) == message.function_call.arguments
    assert [call.name for call in calls if call.name] == ["get_weather"]
    turns = [*ASK, message.to_dict(), {"role": "function", "name": "get_weather", "content": "hot"}]
    second = client.chat.completions.create(model="auto", messages=turns, functions=[function])  # type: ignore[call-overload]
    assert second.choices[0].message.content == "It is hot."


def test_several_answers_streamed_or_not(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}], "n": 3}
    whole = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == ["0: Hi", "1: Hi", "2: Hi"]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "length", "length"]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = dict.fromkeys(range(3), "")
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


# --- completions


def test_every_form_of_prompts(client: OpenAI) -> None:
    def texts(prompt: Any, **more: Any) -> list[str]:
        done = client.completions.create(model="auto", prompt=prompt, **more)
        assert [choice.index for choice in done.choices] == list(range(len(done.choices)))
        return [choice.text for choice in done.choices]

    assert texts("a") == ["0: a"]
    assert texts(["a"]) == ["0: a"]
    assert texts([1, 2]) == ["0: 1 2"]
    assert texts([[1, 2], [3]]) == ["0: 1 2", "0: 3"]
    assert texts(["a", "b"], n=2, best_of=2) == ["0: a", "1: a", "0: b", "1: b"]
    streamed = dict.fromkeys(range(4), "")
    chunks = client.completions.create(
        model="auto", prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == ["0: a", "1: a", "0: b", "1: b"]
    assert chunk.usage is not None
    assert chunk.usage.prompt_tokens == 14  # of both tasks


# --- responses


def outputs_of(response: Any) -> list[dict[str, Any]]:
    """What a client hands in for the calls of a response."""
    return [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": f"hot in {json.loads(item.arguments)['place']}",
        }
        for item in response.output
        if item.type == "function_call"
    ]


def test_a_response_calls_tools_and_is_continued(client: OpenAI) -> None:
    first = client.responses.create(
        model="auto",
        input="Weather?",
        instructions="Be brief.",
        tools=FLAT,
        tool_choice={"type": "function", "name": "get_weather"},
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        text={"verbosity": "low"},
        max_tool_calls=3,
    )
    assert first.status == "completed"
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    assert first.output_text == "Let me look."
    assert first.output[0].summary[0].text == "Two places."  # type: ignore[union-attr]
    assert first.instructions == "Be brief."
    assert first.tool_choice.model_dump() == {"type": "function", "name": "get_weather"}  # type: ignore[union-attr]
    assert first.tools[0].name == "get_weather"  # type: ignore[union-attr]
    assert first.reasoning is not None
    assert first.reasoning.effort == "low"
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens == 2
    again = client.responses.retrieve(first.id)
    assert again.to_dict() == first.to_dict()
    given: Any = outputs_of(first)
    by_id = client.responses.create(model="auto", input=given, previous_response_id=first.id, tools=FLAT)
    assert by_id.output_text == "It is hot in Rome and hot in Oslo."
    assert by_id.instructions is None
    assert by_id.previous_response_id == first.id
    kept = [{"role": "user", "content": "Weather?"}, *(item.to_dict() for item in first.output), *given]
    by_items = client.responses.create(model="auto", input=kept, tools=FLAT, store=False)
    assert by_items.output_text == by_id.output_text
    referred = [kept[0], *({"type": "item_reference", "id": item.id} for item in first.output), *given]
    by_reference = client.responses.create(model="auto", input=referred, tools=FLAT)
    assert by_reference.output_text == by_id.output_text
    shown = [item.type for item in client.responses.input_items.list(by_id.id, order="asc")]
    assert shown == ["message", "reasoning", "message", *["function_call"] * 2, *["function_call_output"] * 2]
    with pytest.raises(openai.BadRequestError, match=r"input\.0\.call_id"):
        client.responses.create(model="auto", input=given, tools=FLAT)


def test_a_streamed_response_gives_the_same_again_and_from_anywhere(client: OpenAI) -> None:
    with client.responses.stream(model="auto", input="Weather?", tools=FLAT) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    kinds = [event.type for event in seen]
    for kind in ("reasoning_text", "output_text", "function_call_arguments"):
        assert f"response.{kind}.delta" in kinds
        assert f"response.{kind}.done" in kinds
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    again = list(client.responses.retrieve(final.id, stream=True))
    parsed = ("snapshot", "parsed")  # the client's own
    whole = [{k: v for k, v in event.to_dict().items() if k not in parsed} for event in seen[:-1]]
    assert [event.to_dict() for event in again[:-1]] == whole
    later = list(client.responses.retrieve(final.id, stream=True, starting_after=seen[5].sequence_number))
    assert [event.to_dict() for event in later] == [event.to_dict() for event in again[6:]]


def test_a_background_response_calls_tools(client: OpenAI) -> None:
    made = client.responses.create(model="auto", input="Weather?", tools=FLAT, background=True)
    done = eventually(
        lambda: r if (r := client.responses.retrieve(made.id)).status == "completed" else None, "it is completed"
    )
    assert done.background is True
    assert len(outputs_of(done)) == 2


# --- batches


@pytest.mark.parametrize(
    ("endpoint", "body", "where"),
    [
        (
            "/v1/chat/completions",
            {"messages": ASK, "tools": TOOLS, "tool_choice": "required"},
            lambda body: [c["function"]["name"] for c in body["choices"][0]["message"]["tool_calls"]],
        ),
        (
            "/v1/chat/completions",
            {"messages": ASK, "functions": [{"name": "get_weather"}]},
            lambda body: [body["choices"][0]["message"]["function_call"]["name"]] * 2,
        ),
        (
            "/v1/responses",
            {"input": "Weather?", "tools": FLAT},
            lambda body: [item["name"] for item in body["output"] if item["type"] == "function_call"],
        ),
    ],
)
def test_a_batch_takes_the_same_requests(client: OpenAI, endpoint: Any, body: dict[str, Any], where: Any) -> None:
    line = json.dumps({"custom_id": "a", "method": "POST", "url": endpoint, "body": body})
    file = client.files.create(file=("a.jsonl", line.encode()), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    batch = eventually(
        lambda: b if (b := client.batches.retrieve(made.id)).status == "completed" else None, "the batch is done"
    )
    assert batch.output_file_id, client.files.content(batch.error_file_id or "").text
    entry = json.loads(client.files.content(batch.output_file_id).text)
    assert where(entry["response"]["body"]) == ["get_weather"] * 2
