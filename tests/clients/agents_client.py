"""The OpenAI Agents SDK: a loop of two turns over both endpoints, whole and streamed; the first must call the tool,
which the SDK itself resets after the call, so that the second is text."""

from __future__ import annotations

import asyncio

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled as disable_tracing
from openai import AsyncOpenAI

disable_tracing(True)  # traces go to OpenAI
called: list[str] = []


@function_tool
def get_weather(place: str) -> str:
    """The weather of a place."""
    called.append(place)
    return f"It is sunny in {place}."


async def main() -> None:
    client = AsyncOpenAI()
    for model in (OpenAIChatCompletionsModel("auto", client), OpenAIResponsesModel("auto", client)):
        agent = Agent(
            name="weather",
            instructions="Be brief.",
            tools=[get_weather],
            model=model,
            model_settings=ModelSettings(tool_choice="required", max_tokens=64, parallel_tool_calls=False),
        )
        called.clear()
        result = await Runner.run(agent, "What is the weather in Rome?")
        assert called
        assert result.final_output
        assert len(result.raw_responses) == 2
        assert sum(response.usage.output_tokens for response in result.raw_responses) > 0
        called.clear()
        streamed = Runner.run_streamed(agent, "What is the weather in Rome?")
        kinds = [event.name async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
        assert called
        assert {"tool_called", "tool_output", "message_output_created"} <= set(kinds), kinds
        assert streamed.final_output
        more = await Runner.run(agent, [*result.to_input_list(), {"role": "user", "content": "And in Oslo?"}])
        assert more.final_output


asyncio.run(main())
