"""LiteLLM: chats, streams built together again, a turn of tools, text completions, responses, embeddings."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
import litellm

litellm.suppress_debug_info = True  # else it prints where its providers are listed
MODEL = "openai/auto"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]

answer = litellm.completion(MODEL, MESSAGES, max_tokens=16, n=2, temperature=1)
assert len(answer.choices) == 2
assert answer.choices[0].message.content
chunks = list(litellm.completion(MODEL, MESSAGES, max_tokens=16, stream=True, stream_options={"include_usage": True}))
whole = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
assert whole.choices[0].message.content
assert whole.usage.completion_tokens > 0

for stream in (False, True):
    first = litellm.completion(
        MODEL, MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, stream=stream
    )
    if stream:
        first = litellm.stream_chunk_builder(list(first), messages=MESSAGES)
    message = first.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["place"], str)
    turns = [*MESSAGES, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = litellm.completion(MODEL, turns, tools=TOOLS, tool_choice="none", max_tokens=24)
    assert second.choices[0].message.content

schema = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": WEATHER["parameters"]}}
formed = litellm.completion(MODEL, MESSAGES, response_format=schema)
assert list(json.loads(formed.choices[0].message.content)) == ["place"]

texts = litellm.text_completion(model="text-completion-openai/auto", prompt=["One, two,", "A, B,"], max_tokens=4)
assert len(texts.choices) == 2
response = litellm.responses(
    input="Weather in Rome?",
    model=MODEL,
    tools=[{"type": "function", **WEATHER}],
    tool_choice="required",
)
assert "function_call" in [item.type for item in response.output]
vectors = litellm.embedding(MODEL, input=["the sky", "the sea"])
assert len(vectors.data) == 2
assert all(isinstance(number, float) for number in vectors.data[0]["embedding"])
try:
    litellm.completion("openai/gpt-4o", MESSAGES)
except litellm.NotFoundError as error:
    assert "gpt-4o" in str(error)
else:
    raise AssertionError("a model nobody serves was accepted")
