"""Pydantic AI: an agent's loop over both endpoints, a stream of it, typed output by a tool and by a schema."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel


class Person(BaseModel):
    name: str
    age: int


def loop(model: OpenAIChatModel | OpenAIResponsesModel) -> None:
    """The first turn calls a tool, the second answers."""
    called: list[str] = []
    agent = Agent(model, instructions="Be brief.")

    @agent.tool_plain
    def get_weather(place: str) -> str:
        """The weather of a place."""
        called.append(place)
        return f"It is sunny in {place}."

    result = agent.run_sync(
        "What is the weather in Rome?",
        model_settings=lambda context: {
            "max_tokens": 128,
            "tool_choice": "none" if called else "required",
        },
    )
    assert called
    assert result.output
    assert result.usage.requests == 2
    assert result.usage.output_tokens > 0

    async def stream() -> str:
        async with agent.run_stream("Name a river.", model_settings={"max_tokens": 16, "tool_choice": "none"}) as run:
            return "".join([piece async for piece in run.stream_text(delta=True)])

    assert asyncio.run(stream())


for model in (OpenAIChatModel("auto"), OpenAIResponsesModel("auto")):
    loop(model)
    for output in (ToolOutput(Person), NativeOutput(Person)):
        typed = Agent(model, output_type=output).run_sync("Ann is 41 years old.", model_settings={"max_tokens": 128})
        assert isinstance(typed.output, Person)
