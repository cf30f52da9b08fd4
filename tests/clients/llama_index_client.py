"""LlamaIndex's OpenAI-like classes: completion and chat, streams, tools, structured output, embeddings."""

from __future__ import annotations

import os

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

BASE = os.environ["OPENAI_BASE_URL"]
ASK = ChatMessage(role="user", content="What is the weather in Rome?")


class Person(BaseModel):
    name: str
    age: int


def get_weather(place: str) -> str:
    """The weather of a place."""
    return f"It is sunny in {place}."


llm = OpenAILike(
    model="auto",
    api_base=BASE,
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    max_tokens=64,
)
assert llm.complete("Name a river.").text
assert "".join(piece.delta or "" for piece in llm.stream_chat([ASK]))
tool = FunctionTool.from_defaults(get_weather)
first = llm.chat_with_tools([tool], chat_history=[ASK], tool_required=True)
calls = llm.get_tool_calls_from_response(first)
assert [call.tool_name for call in calls] == ["get_weather"]
turns = [ASK, first.message]
turns += [
    ChatMessage(role="tool", content=str(tool(**call.tool_kwargs)), additional_kwargs={"tool_call_id": call.tool_id})
    for call in calls
]
assert llm.chat(turns).message.content
person = llm.as_structured_llm(Person).chat([ChatMessage(role="user", content="Ann is 41 years old.")]).raw
assert isinstance(person, Person)

text = OpenAILike(model="auto", api_base=BASE, is_chat_model=False, max_tokens=8)
assert text.complete("One, two,").text
assert "".join(piece.delta or "" for piece in text.stream_complete("One, two,"))

embeddings = OpenAILikeEmbedding(model_name="auto", api_base=BASE)
assert len(embeddings.get_text_embedding_batch(["the sky", "the sea"])) == 2
assert embeddings.get_query_embedding("the sky")
