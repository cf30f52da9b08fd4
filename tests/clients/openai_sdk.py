"""The official Python SDK: chats, streams, tools, structured output, responses, embeddings, batches, errors."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import openai
from pydantic import BaseModel

client = openai.OpenAI()  # OPENAI_BASE_URL
SKY: Any = [{"role": "user", "content": "Why is the sky blue? One sentence."}]
ASK: Any = [{"role": "user", "content": "What is the weather in Rome?"}]


class GetWeather(BaseModel):
    """The weather of a place."""

    place: str
    unit: Literal["celsius", "fahrenheit"]


class Person(BaseModel):
    name: str
    age: int
    hobbies: list[str]


def chats() -> None:
    answer = client.chat.completions.create(model="auto", messages=SKY, max_tokens=24)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id
    stream = client.chat.completions.create(
        model="auto", messages=SKY, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    several = client.chat.completions.create(
        model="auto", messages=SKY, n=2, temperature=1, seed=7, max_tokens=16, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].message.content != several.choices[1].message.content
    assert several.choices[0].logprobs is not None
    assert all(len(token.top_logprobs) == 2 for token in several.choices[0].logprobs.content or ())


def tools() -> None:
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        first = client.chat.completions.create(model="auto", messages=ASK, tools=[tool], tool_choice=choice)
        assert first.choices[0].finish_reason in ("tool_calls", "stop")  # OpenAI's own says stop where one is named
        calls = first.choices[0].message.tool_calls
        assert calls
        assert all(call.function.name == "get_weather" for call in calls)
        GetWeather.model_validate_json(calls[0].function.arguments)
    turns = [*ASK, first.choices[0].message]
    turns += [{"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"} for call in calls]
    second = client.chat.completions.create(model="auto", messages=turns, tools=[tool], tool_choice="none")
    assert second.choices[0].message.content
    assert not second.choices[0].message.tool_calls
    with client.chat.completions.stream(model="auto", messages=ASK, tools=[tool], tool_choice="required") as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    (call, *_) = final.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, GetWeather)
    free = client.chat.completions.create(model="auto", messages=ASK, tools=[tool], max_tokens=64)
    for call in free.choices[0].message.tool_calls or ():
        json.loads(call.function.arguments)


def structured() -> None:
    asked: Any = [{"role": "user", "content": "Ann is 41 and likes chess and tea."}]
    parsed = client.chat.completions.parse(model="auto", messages=asked, response_format=Person)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    response = client.responses.parse(model="auto", input=asked, text_format=Person)
    assert isinstance(response.output_parsed, Person)
    with client.chat.completions.stream(model="auto", messages=asked, response_format=Person) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)
    loose = client.chat.completions.create(model="auto", messages=asked, response_format={"type": "json_object"})
    assert isinstance(json.loads(loose.choices[0].message.content or ""), dict)


def responses() -> None:
    first = client.responses.create(model="auto", instructions="Be brief.", input="Name a river.", max_output_tokens=16)
    assert first.output_text
    assert first.status in ("completed", "incomplete")
    second = client.responses.create(
        model="auto", input="And a sea?", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.output_text
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(second.id).output_text == second.output_text
    assert [item.type for item in client.responses.input_items.list(second.id)]
    with client.responses.stream(model="auto", input="Name a river.", max_output_tokens=16) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == text
    late = client.responses.create(model="auto", input="Name a town.", max_output_tokens=16, background=True)
    while late.status in ("queued", "in_progress"):
        time.sleep(0.1)
        late = client.responses.retrieve(late.id)
    assert late.output_text
    client.responses.delete(late.id)
    tool = openai.pydantic_function_tool(GetWeather)["function"]
    called = client.responses.create(
        model="auto", input="Weather in Rome?", tools=[{"type": "function", **tool}], tool_choice="required"
    )
    answers: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in called.output
        if item.type == "function_call"
    ]
    assert answers
    told = client.responses.create(
        model="auto", input=answers, previous_response_id=called.id, max_output_tokens=24, truncation="disabled"
    )
    assert told.output_text


def completions() -> None:
    answer = client.completions.create(model="auto", prompt=["One, two,", "A, B,"], max_tokens=4, n=2, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    pieces = client.completions.create(model="auto", prompt="One, two,", max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices)


def embeddings() -> None:
    whole = client.embeddings.create(model="auto", input=["the sky", "the sea"])  # base64 on the wire
    plain = client.embeddings.create(model="auto", input="the sky", encoding_format="float")
    assert [item.index for item in whole.data] == [0, 1]
    assert all(abs(a - b) < 1e-3 for a, b in zip(whole.data[0].embedding, plain.data[0].embedding, strict=True))
    short = client.embeddings.create(model="auto", input=[[1, 2, 3], [4, 5]], dimensions=16)
    assert [len(item.embedding) for item in short.data] == [16, 16]
    assert whole.usage.prompt_tokens > 0


def batches() -> None:
    def run(url: Any, *bodies: dict[str, Any]) -> list[Any]:
        lines = [
            json.dumps({"custom_id": str(n), "method": "POST", "url": url, "body": body})
            for n, body in enumerate(bodies)
        ]
        file = client.files.create(file=("batch.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            time.sleep(0.2)
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed", batch
        assert batch.request_counts is not None
        assert batch.request_counts.completed == len(bodies)
        assert batch.output_file_id
        done = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        done.sort(key=lambda line: int(line["custom_id"]))
        assert all(line["response"]["status_code"] == 200 and line["error"] is None for line in done)
        assert batch.id in [one.id for one in client.batches.list()]
        return [line["response"]["body"] for line in done]

    tool = openai.pydantic_function_tool(GetWeather)
    chats = run(
        "/v1/chat/completions",
        {"model": "auto", "messages": SKY, "max_tokens": 8},
        {"model": "auto", "messages": ASK, "tools": [tool], "tool_choice": "required"},
    )
    assert chats[0]["choices"][0]["message"]["content"]
    assert chats[1]["choices"][0]["message"]["tool_calls"]
    vectors = run("/v1/embeddings", *[{"model": "auto", "input": f"text {n}"} for n in range(8)])
    assert all(body["data"][0]["embedding"] for body in vectors)


def errors() -> None:
    assert "auto" not in [model.id for model in client.models.list()]
    assert all(client.models.retrieve(model.id).id == model.id for model in client.models.list())
    refused: tuple[tuple[Any, Any], ...] = (
        (openai.NotFoundError, {"model": "gpt-4o"}),
        (openai.BadRequestError, {"model": "auto", "temperature": 9}),
        (openai.BadRequestError, {"model": "auto", "modalities": ["audio"]}),
    )
    for kind, fields in refused:
        try:
            client.chat.completions.create(messages=SKY, **fields)
        except kind as error:
            assert error.request_id
            assert error.body["message"]
        else:
            raise AssertionError(f"{fields} was accepted")


for part in (chats, tools, structured, responses, completions, embeddings, batches, errors):
    part()
