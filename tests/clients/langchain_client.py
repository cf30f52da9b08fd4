"""LangChain's ChatOpenAI, OpenAI and OpenAIEmbeddings: answers, streams, tools, structured output, vectors."""

from __future__ import annotations

from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel


@tool
def get_weather(place: str) -> str:
    """The weather of a place."""
    return f"It is sunny in {place}."


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def answers(llm: ChatOpenAI) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "Name a {thing}.")]) | llm
    answer = chain.invoke({"thing": "river"})
    assert isinstance(answer, AIMessage)
    assert answer.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    pieces = list(chain.stream({"thing": "river"}))
    assert "".join(piece.text for piece in pieces)
    assert len(chain.batch([{"thing": "sea"}, {"thing": "town"}])) == 2


def tools(llm: ChatOpenAI) -> None:
    messages = [HumanMessage("What is the weather in Rome?")]
    first = llm.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False).invoke(messages)
    assert first.tool_calls
    assert not first.invalid_tool_calls
    messages += [first, *(get_weather.invoke(call) for call in first.tool_calls)]
    second = llm.bind_tools([get_weather], tool_choice="none").invoke(messages)
    assert second.text
    whole = AIMessageChunk("")
    for piece in llm.bind_tools([get_weather], tool_choice="get_weather").stream(messages[:1]):
        whole += piece
    assert [call["name"] for call in whole.tool_calls] == ["get_weather"]
    assert isinstance(llm.bind_tools([get_weather]).invoke(messages[:1]), AIMessage)  # says what it likes


def structured(llm: ChatOpenAI) -> None:
    for method in ("json_schema", "function_calling"):
        person = llm.with_structured_output(Person, method=method).invoke("Ann is 41 years old.")
        assert isinstance(person, Person)


chat = ChatOpenAI(model="auto", max_completion_tokens=64)
responses = ChatOpenAI(model="auto", max_completion_tokens=64, use_responses_api=True)
for api in (chat, responses):
    answers(api)
    tools(api)
    structured(api)
several = ChatOpenAI(model="auto", n=2, temperature=1, max_completion_tokens=8)
both = several.generate([[HumanMessage("Name a river.")]])
assert len(both.generations[0]) == 2
completion = OpenAI(model="auto", max_tokens=8)
assert completion.invoke("One, two,")
assert "".join(completion.stream("One, two,"))
# Not OpenAI's vocabulary, so texts go as they are: LangChain's advice for other servers.
embeddings = OpenAIEmbeddings(model="auto", check_embedding_ctx_length=False)
assert len(embeddings.embed_documents(["the sky", "the sea"])) == 2
assert embeddings.embed_query("the sky")
