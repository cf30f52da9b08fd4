"""Whatever the door accepts can be stored, read back and answered; any answer is one that the official client reads,
streamed or not, and that comes back as the turn it was."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai._models import construct_type
from openai._types import omit
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError
from support import make
from support.answers import outputs, pieces, texts

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Message, Output, Receipt, Result, State, TaskSpec
from perllm.broker.openai import chat, completions, items, responses, translation, turns
from perllm.broker.openai.chat import ChatStream
from perllm.broker.openai.completions import CompletionStream
from perllm.broker.openai.requests import ChatRequest, CompletionRequest, ResponseRequest
from perllm.broker.openai.response_events import ResponseStream
from perllm.broker.openai.translation import CHAT, COMPLETIONS, RESPONSES

RECEIPT: Receipt = make.receipt("one", tokens=3)
SPEC = TaskSpec(messages=[{"role": "user", "content": "hi"}])
few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])  # the client's models are slow
EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def succeeded(output: Output) -> Result:
    return Result(id="t-1", state=State.SUCCEEDED, on_time=True, latency=1.0, output=output, receipt=RECEIPT)


def sent(value: Any) -> Any:
    """As it comes out of the client's JSON parser."""
    return json.loads(json.dumps(value, allow_nan=False))


# --- requests

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
function = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b", "", "ä"])},
    optional={"description": texts, "parameters": json_values | st.just({"type": "object"}), "strict": st.booleans()},
)
tools = st.lists(
    st.builds(lambda f: {"type": "function", "function": f}, function)
    | st.builds(lambda f: {"type": "function", **f}, function)
    | st.fixed_dictionaries({"type": st.sampled_from(["custom", "web_search", "mcp"])}),
    max_size=3,
)
named = st.sampled_from(
    [{"name": "a"}, {"type": "function", "name": "a"}, {"type": "function", "function": {"name": "a"}}]
)
choice = (
    st.sampled_from(["auto", "none", "required"])
    | named
    | st.builds(lambda t: {"type": "allowed_tools", "mode": "auto", "tools": t}, st.lists(named, max_size=2))
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text", "output_text", "image_url", "refusal"])},
                          optional={"text": texts, "refusal": texts}),
    max_size=2,
)  # fmt: skip
ids = st.sampled_from(["c1", "c2", ""])
call = st.builds(
    lambda i, n, a: {"id": i, "type": "function", "function": {"name": n, "arguments": a}}, ids, st.just("a"), texts
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])},
    optional={
        "content": texts | parts | st.none(),
        "tool_calls": st.lists(call, max_size=2),
        "tool_call_id": ids,
        "reasoning_content": texts,
        "name": texts,
    },
)
item = (
    turn
    | st.fixed_dictionaries(
        {"type": st.just("function_call"), "call_id": ids, "name": st.just("a"), "arguments": texts}
    )
    | st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": ids, "output": texts | parts})
    | st.fixed_dictionaries({"type": st.just("reasoning"), "summary": parts, "content": parts})
    | st.fixed_dictionaries({"type": st.just("computer_call")})
)
#: What a field could have that is meant for it.
MEANT: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(turn, min_size=1, max_size=4),
    "input": texts | st.lists(item, min_size=1, max_size=5),
    "prompt": texts | st.lists(texts, max_size=2) | st.lists(st.integers(-1, 9), max_size=3),
    "tools": tools,
    "functions": st.lists(function, max_size=2),
    "tool_choice": choice,
    "function_call": choice,
    "instructions": texts,
    "n": st.integers(-1, 17),
    "best_of": st.integers(0, 3),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "50256", "x"]), st.floats(-200, 200), max_size=2),
    "response_format": st.sampled_from(
        [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {}}}]
    ),
    "text": st.fixed_dictionaries(
        {},
        optional={"verbosity": st.just("low"), "format": st.just({"type": "json_schema", "name": "n", "schema": {}})},
    ),
    "reasoning": st.fixed_dictionaries({}, optional={"effort": st.just("max"), "summary": st.just("auto")}),
    "include": st.lists(st.sampled_from(["message.output_text.logprobs", "x"]), max_size=2),
    "seed": st.integers(),
    "echo": st.booleans(),
    "suffix": texts,
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 21),
    "max_tokens": st.integers(0, 10),
    "guided_choice": st.lists(texts, max_size=2),
    "top_k": st.integers(-2, 5),
}
MODELS = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest, RESPONSES: ResponseRequest}


@st.composite
def bodies(draw: st.DrawFn, url: str) -> dict[str, Any]:
    """Bodies that are mostly meant well."""
    required = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input"}[url]
    names = draw(st.sets(st.sampled_from([*MODELS[url].model_fields, "nonsense"]), max_size=5)) | {required}
    odd = draw(st.integers(0, 9)) == 0
    return {name: draw(json_values if odd or name not in MEANT else MEANT[name]) for name in sorted(names)}


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_what_the_door_accepts_can_be_stored_read_back_and_answered(data: st.DataObject) -> None:
    url = data.draw(st.sampled_from(list(MODELS)))
    body = data.draw(bodies(url))
    try:
        fields = translation.task_fields(body, url)
    except InvalidTask:
        return
    assert set(fields) <= set(TaskSpec.model_fields)
    try:
        spec = TaskSpec.model_validate({name: value for name, value in fields.items() if name != "deadline"})
    except ValidationError:
        return
    assert TaskSpec.model_validate_json(spec.model_dump_json(exclude_defaults=True)) == spec
    output = data.draw(outputs(most=1))
    answer = sent(translation.response_body(url, succeeded(output), spec, 1.0))
    assert answer["id"] == "t-1"
    for state in State:
        result = Result(id="t-1", state=state, on_time=False, latency=1.0) if state.final else None
        assert sent(responses.response_object("t-1", spec, 1.0, state, result))


# --- answers


@few
@given(outputs())
def test_any_answer_is_a_chat_completion_to_the_official_client(output: Output) -> None:
    read = ChatCompletion.model_validate(sent(chat.body(succeeded(output), SPEC, 1.0)))
    assert [choice.message.content or "" for choice in read.choices] == [choice.text for choice in output.choices]
    for shown, made in zip(read.choices, output.choices, strict=True):
        called = [(c.id, c.function.name, c.function.arguments) for c in shown.message.tool_calls or ()]
        assert called == [(c.id, c.name, c.arguments) for c in made.tool_calls]
        assert (shown.message.model_extra or {}).get("reasoning_content") == made.reasoning


@few
@given(st.data())
def test_the_pieces_of_a_chat_are_the_whole(data: st.DataObject) -> None:
    output = data.draw(outputs())
    spec = SPEC.model_copy(update={"n": len(output.choices)})
    stream, state = ChatStream("t-1", spec, 1.0, with_usage=True), ChatCompletionStreamState()
    chunks = list(stream.opening())
    for piece in data.draw(pieces(output)):
        chunks += stream.piece(piece)
    last = stream.end(succeeded(output))
    assert last is not None
    for chunk in [*chunks, *last]:
        state.handle_chunk(ChatCompletionChunk.model_validate(sent(chunk)))
    read = state.current_completion_snapshot
    whole = ChatCompletion.model_validate(sent(chat.body(succeeded(output), spec, 1.0)))
    assert read.usage == whole.usage
    for got, meant in zip(read.choices, whole.choices, strict=True):
        assert shown_of(got) == shown_of(meant)


def shown_of(choice: Any) -> tuple[Any, ...]:
    """What a client sees of a chat's choice."""
    message, logprobs = choice.message, choice.logprobs
    calls = [(c.id, c.type, c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    thought = (message.model_extra or {}).get("reasoning_content")
    return message.content or "", thought or "", calls, choice.finish_reason, logprobs and logprobs.content


@few
@given(st.data())
def test_the_pieces_of_several_prompts_completions_are_the_whole(data: st.DataObject) -> None:
    answers = [data.draw(outputs(most=1)) for _ in range(2)]
    specs = [TaskSpec(prompt="a"), TaskSpec(prompt="b")]
    stream = CompletionStream(["t-1", "t-2"], specs, 1.0, with_usage=True)
    chunks: list[dict[str, Any]] = []
    for number, output in enumerate(answers):
        for piece in data.draw(pieces(output)):
            chunks += stream.piece(number, piece)
    for number, output in reversed(list(enumerate(answers))):
        chunks += stream.end(number, succeeded(output)) or ()
    read = [construct_type(type_=Completion, value=sent(chunk)) for chunk in chunks]  # as the client does
    whole = Completion.model_validate(sent(completions.body([succeeded(output) for output in answers], 1.0)))
    for choice in whole.choices:
        mine = [c for chunk in read for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
        assert mine[-1].logprobs == choice.logprobs
    assert read[-1].usage == whole.usage


@few
@given(st.data())
def test_the_events_of_a_response_are_the_whole(data: st.DataObject) -> None:
    output = data.draw(outputs(most=1))
    said = data.draw(pieces(output))
    spec = SPEC.model_copy(update={"request": data.draw(st.sampled_from([{}, {"summary": "auto"}]))})

    def events() -> list[dict[str, Any]]:
        stream = ResponseStream("t-1", spec, 1.0)
        made = list(stream.opening())
        for piece in said:
            made += stream.piece(piece)
        return sent([*made, *stream.end(succeeded(output))])

    state: ResponseStreamState[None] = ResponseStreamState(input_tools=omit, text_format=omit)
    told: dict[str, str] = {}
    done: dict[str, str] = {}
    whole = sent(responses.response_object("t-1", spec, 1.0, State.SUCCEEDED, succeeded(output)))
    Response.model_validate(whole)
    for number, event in enumerate(events()):
        assert event["sequence_number"] == number
        state.handle_event(EVENTS.validate_python(event))
        if event["type"].endswith(".delta"):
            told[event["item_id"]] = told.get(event["item_id"], "") + event["delta"]
        elif event["type"].endswith(("_arguments.done", "_text.done")):
            done[event["item_id"]] = event.get("text", event.get("arguments"))
        elif event["type"] == "response.output_item.done":
            assert event["item"] in whole["output"] or event["item"]["status"] == "completed"
    assert events() == events()
    assert told.items() <= done.items()
    final = event["response"]
    assert sorted(final["output"], key=lambda i: i["id"]) == sorted(whole["output"], key=lambda i: i["id"])
    assert {item["id"] for item in whole["output"]} == set(done)
    for shown in whole["output"]:
        parts = [*shown.get("content", ()), *shown.get("summary", ())]
        said_of_it = shown.get("arguments") or "".join(part["text"] for part in parts)
        assert done[shown["id"]] == said_of_it


@few
@given(outputs(most=1))
def test_an_answer_comes_back_as_the_turn_it_was(output: Output) -> None:
    message = sent(chat.body(succeeded(output), SPEC, 1.0))["choices"][0]["message"]
    shown = sent(responses.response_object("t-1", SPEC, 1.0, State.SUCCEEDED, succeeded(output)))["output"]
    (again,) = items.input_turns(shown)
    meant = turn_of(items.answer_turn(output))
    assert turn_of(turns.turn(message, "messages.0")) == meant
    assert turn_of(again) == meant


def turn_of(fields: dict[str, Any]) -> tuple[Any, ...]:
    """What a template sees of a turn."""
    turn = Message.model_validate(fields)
    called = [(call.id, call.name, call.arguments or "{}") for call in turn.tool_calls]
    return turn.role, turn.content or "", turn.reasoning or "", called
