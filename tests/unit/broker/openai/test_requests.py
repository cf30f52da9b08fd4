"""Requests become tasks: what each form of a field means, and what is said of what is wrong, in the request's words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from perllm.broker.errors import InvalidTask, field_errors
from perllm.broker.messages import Message, TaskSpec
from perllm.broker.openai import completions, items, responses, translation, turns
from perllm.broker.openai.sampling import as_asked
from perllm.broker.openai.translation import CHAT, COMPLETIONS, RESPONSES

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "a"}}
FLAT = {"type": "function", "name": "b"}


def call(identity: str = "c1", name: str = "a", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def asked(url: str, **body: Any) -> TaskSpec:
    return TaskSpec.model_validate(translation.task_fields(body, url))


def wrong(url: str, **body: Any) -> str:
    """What is said of a body whose fields are known."""
    try:
        fields = translation.task_fields(body, url)
    except InvalidTask as error:
        return str(error)
    with pytest.raises(ValidationError) as caught:
        TaskSpec.model_validate(fields)
    return as_asked(field_errors(caught.value), body)


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ("auto", ("auto", ())),
        ("none", ("none", ())),
        ("required", ("required", ())),
        ({"type": "function", "function": {"name": "a"}}, ("required", ("a",))),
        ({"type": "function", "name": "b"}, ("required", ("b",))),
        ({"type": "allowed_tools", "mode": "auto", "tools": [FLAT]}, ("auto", ("b",))),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL, FLAT]}},
            ("required", ("a", "b")),
        ),
    ],
)
@pytest.mark.parametrize(("url", "required"), [(CHAT, {"messages": [USER]}), (RESPONSES, {"input": "hi"})])
def test_every_form_of_a_choice(url: str, required: dict[str, Any], choice: Any, meant: Any) -> None:
    spec = asked(url, **required, tools=[TOOL, FLAT], tool_choice=choice)
    assert (spec.tool_choice, spec.allowed_tools) == meant
    shown = responses.response_object("t", spec, 0.0, translation.responses.State.PENDING, None)["tool_choice"]
    assert asked(RESPONSES, input="hi", tools=[TOOL, FLAT], tool_choice=shown).allowed_tools == spec.allowed_tools


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tools": [{"type": "mcp"}]}, "tools.0.type: 'mcp': built-in tools"),
        ({"tools": [TOOL, {"type": "function", "function": {"name": "ä"}}]}, "tools.1.function.name: "),
        ({"tools": [TOOL, TOOL]}, "tools: two are named 'a'"),
        ({"tools": [{"type": "function", "name": "a", "parameters": []}]}, "tools.0.parameters: an object"),
        ({"tools": [{"type": "function", "function": {"name": "a", "colour": 1}}]}, "tools.0.function.colour: "),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice: 'tools' has"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice: 'web_search': only functions"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice: give auto"),
        ({"tools": [TOOL] * 129}, "tools: 129 tools; the limit is 128"),
        ({"tools": [TOOL], "functions": [{"name": "a"}]}, "functions: give 'tools'"),
        ({"function_call": {"name": "a"}}, "function_call: 'tools' has none"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]: "),
        ({"n": 17}, "n: "),
        ({"max_completion_tokens": 0}, "max_completion_tokens: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"guided_choice": [""]}, "guided_choice: "),
        ({"guided_json": "{"}, "guided_json: is not JSON"),
        ({"structured_outputs": {"json": {}, "choice": ["a"]}}, "structured_outputs: give exactly one"),
        ({"response_format": {"type": "json_schema"}}, "response_format: "),
        ({"response_format": {"type": "json_object"}, "grammar": "root ::= \"a\""}, "task: give at most one"),
        ({"top_logprobs": 21}, "top_logprobs: "),
        ({"reasoning_effort": "much"}, "reasoning_effort: "),
        ({"audio": {"voice": "x"}}, "audio: answers are text"),
        ({"messages": [{**USER, "tool_calls": [call()]}]}, "messages.0: only an assistant's"),
        ({"messages": [{"role": "assistant", "tool_calls": [call(arguments={})]}]}, "messages.0.tool_calls.0.func"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id: "),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages.0: there is no call 'c'"),
        ({"messages": [{"role": "function", "name": "a", "content": "x"}]}, "messages.0: a function's answer follows"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages.0.audio: audio"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_chat_is_said_in_its_words(body: dict[str, Any], said: str) -> None:
    assert wrong(CHAT, **{"messages": [USER], **body}).startswith(said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens: "),
        ({"reasoning": {"effort": "much"}}, "reasoning: "),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode: "),
        ({"reasoning": "low"}, "reasoning: an object"),
        ({"top_logprobs": -1}, "top_logprobs: "),
        ({"include": ["everything"]}, "include: 'everything' is not known"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"a": [[]] * 70_000}}}}, "text: "),
        ({"background_options": {"completion_window": "3h"}}, "background_options.completion_window: one of"),
        ({"background_options": []}, "background_options: "),
        ({"text": {"verbosity": "much"}}, "text.verbosity: "),
        ({"truncation": "auto"}, "truncation: input is never cut"),
        ({"conversation": {"id": "x"}}, "conversation: "),
        ({"input": []}, "input: "),
        ({"input": [{"type": "image_generation_call"}]}, "input.0: items of type 'image_generation_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0: images"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input.0.call_id: "),
        ({"input": [{"type": "function_call", "call_id": "c", "name": ""}]}, "input.0.name: "),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.0.call_id: there is no"),
    ],
)
def test_what_is_wrong_with_a_response_is_said_in_its_words(body: dict[str, Any], said: str) -> None:
    assert wrong(RESPONSES, **{"input": "hi", **body}).startswith(said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": []}, "prompt: 0 prompts"),
        ({"prompt": ["x"] * 129}, "prompt: 129 prompts"),
        ({"prompt": ["a", "b"]}, "prompt: 2 prompts: give each a line"),
        ({"prompt": [1, "a"]}, "prompt: "),
        ({"prompt": [[]]}, "prompt: "),
        ({"prompt": {"a": 1}}, "prompt: "),
        ({"best_of": 2}, "best_of: only the same as 'n'"),
    ],
)
def test_what_is_wrong_with_a_completion_is_said_in_its_words(body: dict[str, Any], said: str) -> None:
    assert wrong(COMPLETIONS, **{"prompt": "hi", **body}).startswith(said)


@pytest.mark.parametrize(
    ("said", "given", "meant"),
    [
        (
            "reasoning: no node has offered it",
            {"reasoning_effort"},
            "reasoning_effort: reasoning: no node has offered it",
        ),
        ("reasoning: no node has offered it", {"reasoning"}, "reasoning: no node has offered it"),
        ("choices, tools: m does not offer that", {"n", "tools"}, "n: choices, tools: m does not offer that"),
        ("infill: offered by m", {"suffix"}, "suffix: infill: offered by m"),
        ("tools: offered by m", {"tools"}, "tools: offered by m"),
        ("messages: 9 bytes; the limit is 8 bytes", {"input"}, "input: 9 bytes; the limit is 8 bytes"),
        ("something else", {"n"}, "something else"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_of_the_requests_field(said: str, given: set[str], meant: str) -> None:
    assert as_asked(said, given) == meant


def test_prompts_and_their_tokens_are_tasks() -> None:
    made = completions.tasks({"prompt": ["a", [1, 2]], "n": 2, "logprobs": 0})
    assert made == [{"n": 2, "logprobs": 0, "prompt": "a"}, {"n": 2, "logprobs": 0, "prompt_ids": [1, 2]}]


def test_log_probabilities_are_asked_for_in_any_order() -> None:
    for body in ({"logprobs": True, "top_logprobs": 3}, {"top_logprobs": 3, "logprobs": True}):
        assert asked(CHAT, messages=[USER], **body).logprobs == 3
    assert asked(CHAT, messages=[USER], logprobs=True).logprobs == 0
    assert asked(CHAT, messages=[USER], logprobs=False).logprobs is None
    assert asked(RESPONSES, input="hi", include=["message.output_text.logprobs"]).logprobs == 0


def test_any_of_these_texts_is_a_grammar_of_them() -> None:
    spec = asked(CHAT, messages=[USER], guided_choice=["yes", 'n"o\\', "a\nb", "ä"])
    assert spec.grammar == 'root ::= "yes" | "n\\"o\\\\" | "a\\nb" | "ä"'


def test_a_turn_of_an_assistant_keeps_all_it_had() -> None:
    turn = turns.turn(
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call()], "refusal": None}, "m"
    )
    assert Message.model_validate(turn) == Message.model_validate(
        {"role": "assistant", "reasoning": "hm", "tool_calls": [{"id": "c1", "name": "a", "arguments": "{}"}]}
    )
    with_refusal = turns.turn({"role": "assistant", "content": None, "refusal": "no"}, "m")
    assert with_refusal["content"] == "no"


def test_items_of_one_turn_become_one_turn() -> None:
    made = items.input_turns(
        [
            {"role": "user", "content": "q"},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "look"}]},
            {"type": "function_call", "call_id": "c1", "name": "a", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "a", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            {"type": "reasoning", "id": "r2", "summary": [], "encrypted_content": "xyz"},
            {"role": "assistant", "content": "done"},
            {"role": "assistant", "content": "really"},
        ]
    )
    assert [turn["role"] for turn in made] == ["user", "assistant", "tool", "tool", "assistant", "assistant"]
    assert made[1] == {
        "role": "assistant",
        "reasoning": "hm",
        "content": "look",
        "tool_calls": [{"id": f"c{n}", "name": "a", "arguments": "{}"} for n in (1, 2)],
    }
    assert [turn["content"] for turn in made[2:]] == ["1", "2", "done", "really"]


def test_an_items_id_names_its_task() -> None:
    given = [
        {"type": "item_reference", "id": identity}
        for identity in ("msg_0b8f-1", "rs_batch_7-00001", "fc_batch_7-00001_12")
    ]
    assert items.referred(given) == {
        0: ("0b8f-1", "msg_0b8f-1"),
        1: ("batch_7-00001", "rs_batch_7-00001"),
        2: ("batch_7-00001", "fc_batch_7-00001_12"),
    }
    with pytest.raises(InvalidTask, match=r"input\.0\.id"):
        items.referred([{"type": "item_reference", "id": "nonsense"}])


def test_what_a_response_repeats_is_what_was_asked() -> None:
    fields = responses.fields(
        {
            "input": [{"role": "system", "content": "not instructions"}, USER],
            "background": True,
            "previous_response_id": "before",
            "max_output_tokens": 9,
            "reasoning": {"effort": "max", "summary": "auto"},
            "text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": {}}, "verbosity": "high"},
            "parallel_tool_calls": False,
        },
        [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "answer"}],
    )
    spec = TaskSpec.model_validate(fields)
    shown = responses.response_object("t", spec, 0.0, responses.State.PENDING, None)
    assert shown["instructions"] is None
    assert shown["background"] is True
    assert shown["previous_response_id"] == "before"
    assert shown["max_output_tokens"] == 9
    assert shown["reasoning"] == {"effort": "xhigh", "summary": "auto"}
    assert shown["text"]["verbosity"] == "high"
    assert (shown["text"]["format"]["name"], shown["text"]["format"]["strict"]) == ("x", True)
    assert shown["parallel_tool_calls"] is False
    assert [item["content"][0]["text"] for item in responses.input_items("t", spec)] == [
        "earlier",
        "answer",
        "not instructions",
        "hi",
    ]
