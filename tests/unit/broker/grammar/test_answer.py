"""The grammar of an answer holds what must be held, and leaves free what is free, in every family's form."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schemas import parameters

from perllm.broker import grammar
from perllm.broker.chat.forms import CALL_FORMS, GENERIC, THOUGHT_FORMS, AnswerForm, ThoughtForm
from perllm.broker.chat.stream import AnswerStream
from perllm.broker.errors import InvalidTask
from perllm.broker.grammar.answer import answer_grammar
from perllm.broker.messages import TaskSpec

BYTES = llguidance.LLTokenizer("byte")
FORMS = {form.family: form for form in (*CALL_FORMS, GENERIC)}
THINK = ThoughtForm("<think>", "</think>")
ONE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"name": "f", "parameters": ONE}, {"name": "g.h/x"}]


def matcher(spec: TaskSpec, form: AnswerForm | None = None) -> llguidance.LLMatcher:
    made = answer_grammar(spec, form)
    assert made is not None
    one = llguidance.LLMatcher(BYTES, made.text, log_level=0, limits=grammar.limits())
    assert not one.is_error(), one.get_error()
    return one


def fits(text: str, form: AnswerForm | None = None, **fields: Any) -> bool:
    """Whether a text is a whole answer."""
    one = matcher(TaskSpec.model_validate({"prompt": "x", "tools": TOOLS, **fields}), form)
    raw = text.encode()
    return one.try_consume_tokens(list(raw)) == len(raw) and one.is_accepting()


def form(
    family: str, thought: ThoughtForm | None = None, *, thinking: bool = False, naming: bool = False
) -> AnswerForm:
    calls = FORMS[family]
    return AnswerForm(thought, thinking, calls, naming, ("f", "g.h/x"), calls.dropped, calls.text_lead)


#: family → (a call of f with {"a": …}, a call with arguments that do not fit, text, what goes between two calls; None:
#: there is never a second).
WRITTEN = {
    "generic": ('<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>', "Hello", None),
    "hermes": ('<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>', "Hello", "\n"),
    "mistral": ("[TOOL_CALLS]f[ARGS]%s", "Hello", ""),
    "mistral-list": ('[TOOL_CALLS][{"name": "f", "arguments": %s}]', "Hello", None),
    "functionary": ("f\n%s", "all\nHello", None),
    "functionary-tag": ("<function=f>%s</function>", "Hello", ""),
    "functionary-recipient": ("f\n<|content|>%s", "all\n<|content|>Hello", None),
    "harmony": (
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>%s",
        "<|channel|>final<|message|>Hello",
        None,
    ),
    "llama": ('{"name": "f", "parameters": %s}', "Hello", None),
}


@pytest.mark.parametrize("family", WRITTEN)
def test_calls_are_held_to_tools_and_schemas(family: str) -> None:
    call, text, between = WRITTEN[family]
    one = form(family, naming=family in ("functionary", "functionary-recipient"))
    good, bad, other = call % '{"a": 5}', call % '{"a": "5"}', call.replace("f", "q", 1) % "{}"
    assert fits(good, one, tool_choice="required")
    assert not fits(bad, one, tool_choice="required")
    assert not fits(other, one, tool_choice="required")
    assert not fits(text, one, tool_choice="required")
    assert fits(text, one)
    assert fits(bad, one)  # any object will do, where nothing is strict
    assert not fits(call % "5", one)
    strict = [{**TOOLS[0], "strict": True}]
    assert fits(good, one, tools=strict)
    assert not fits(bad, one, tools=strict)
    assert fits(text, one, tools=strict)
    if between is not None:
        assert fits(good + between + good, one, tool_choice="required")
        assert not fits(good + between + good, one, tool_choice="required", parallel_tool_calls=False)
    # and what fits is read back as a call
    stream = AnswerStream(one)
    stream.push(good)
    stream.finish()
    assert [(each.name, each.arguments) for each in stream.calls] == [("f", '{"a": 5}')]
    assert stream.finish_reason("stop") == "tool_calls"


def test_thoughts_are_free_and_only_the_answer_is_held() -> None:
    call = WRITTEN["hermes"][0] % '{"a": 5}'
    asked, begun = form("hermes", THINK), form("hermes", THINK, thinking=True)
    thought = "So <tool_call> it { is"
    for text, one in ((f"<think>{thought}</think>", asked), (f"{thought}</think>\n\n", begun)):
        assert fits(text + call, one, tool_choice="required")
        assert fits(text + "Hello", one)
        assert not fits(text + "Hello", one, tool_choice="required")
        assert not fits(text, one, tool_choice="required")
        assert fits(text + '{"a": 1}', one, tools=[], json_schema=ONE)
    assert fits(call, asked, tool_choice="required")
    assert not fits(call, begun, tool_choice="required")  # all of it is thought
    harmony = form("harmony", THOUGHT_FORMS[0])
    thought = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
    assert fits(2 * thought + WRITTEN["harmony"][0] % '{"a": 5}', harmony, tool_choice="required")


def test_a_document_or_a_call() -> None:
    schema = {"type": "object", "properties": {"q": {"type": "boolean"}}, "required": ["q"]}
    for fields in ({"json_schema": schema}, {"grammar": 'root ::= "{" rest\nrest ::= "\\"q\\": true}"'}):
        assert fits('{"q": true}', **fields)
        assert fits(WRITTEN["generic"][0] % '{"a": 5}', **fields)
        assert not fits("Hello", **fields)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"properties": {"a": {"not": {"type": "null"}}}}, "#/properties/a/not: not supported"),
        ({"properties": {"a": {"oneOf": [{"type": "object"}, {"minProperties": 1}]}}}, "#/properties/a/oneOf: .*anyOf"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=b)"}}}, "#/properties/a/pattern: .*look-ahead"),
        ({"properties": {"a": {"type": "string", "format": "json-pointer"}}}, "#/properties/a/format: Unknown format"),
        ({"properties": {"a": {"enum": [1, 0.1234567890123456789]}}}, "#/properties/a/enum: a number of more than 15"),
        ({"$defs": {"x": {"const": 2**60}}}, "#/\\$defs/x/const: a number of more than 15"),
        ({"properties": {"a": {"const": "\U000abcde"}}}, "#/properties/a/const: .*are no characters"),
        ({"required": ["a"], "minProperties": 3}, "#/minProperties: names that the schema does not list"),
        ({"properties": {"a": {"type": "number", "multipleOf": 99.99999999999999}}}, "#/properties/a/multipleOf"),
        ({"properties": {"a": {"$ref": "http://example.com/"}}}, "cannot be used"),
        ({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(200)]}, "takes longer than 1 s|cannot be"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_tool_and_keyword(parameters: dict[str, Any], said: str) -> None:
    tools = [{"name": "fine"}, {"name": "f", "parameters": {"type": "object", **parameters}}]
    for held in ({"tool_choice": "required"}, {"tools": [tools[0], {**tools[1], "strict": True}]}):
        spec = TaskSpec.model_validate({"prompt": "x", "tools": tools, **held})
        with pytest.raises(InvalidTask, match=f"^tools(.1.parameters)?: .*({said})"):
            grammar.check(spec)
    grammar.check(TaskSpec.model_validate({"prompt": "x", "tools": tools}))  # it is not kept to


def test_what_nobody_checks_is_no_reason_to_refuse() -> None:
    parameters = {
        "type": ["object", "null"],
        "title": "T",
        "properties": {
            "a": {"type": "string", "format": "password", "default": "x", "examples": ["y"]},
            "b": {"type": "array", "uniqueItems": False, "items": {"$ref": "#/$defs/c"}},
        },
        "$defs": {"c": {"type": "object", "properties": {"next": {"$ref": "#/$defs/c"}}, "discriminator": {}}},
    }
    grammar.check(
        TaskSpec.model_validate({"prompt": "x", "tools": [{"name": "f", "parameters": parameters, "strict": True}]})
    )


def test_as_many_tools_as_there_may_be_are_checked_in_time() -> None:
    properties = {f"field_{i}": {"type": "string", "description": "y" * 110} for i in range(10)}
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    tools = [{"name": f"tool-{i}" + "x" * 60, "parameters": parameters} for i in range(128)]
    spec = TaskSpec.model_validate({"prompt": "x", "tools": tools, "tool_choice": "required"})
    grammar.check(spec)


# --- what a grammar lets through is valid


def written(one: llguidance.LLMatcher, dice: random.Random) -> str | None:
    """Some text the grammar allows; None where none came to an end."""
    out = bytearray()
    while len(out) < 3000:
        if one.is_accepting():
            return out.decode()
        bits = np.frombuffer(one.compute_bitmask(), np.uint8)
        allowed = [int(b) for b in np.flatnonzero(np.unpackbits(bits, bitorder="little")[:256])]
        assert allowed, "a dead end"
        ends = [byte for byte in allowed if byte in b'"]}']
        out.append(dice.choice(ends) if ends and dice.random() < 0.4 else dice.choice(allowed))
        one.consume_token(out[-1])
    return None


@settings(max_examples=40, deadline=None)
@given(parameters(leaves=5), st.randoms(use_true_random=False))
def test_whatever_is_let_through_is_valid(schema: dict[str, Any], dice: random.Random) -> None:
    tools = [{"name": "f", "parameters": schema, "strict": True}]
    spec = TaskSpec.model_validate({"prompt": "x", "tools": tools, "tool_choice": "required"})
    try:
        one = matcher(spec)
    except (InvalidTask, AssertionError):
        return  # refused
    if (text := written(one, dice)) is None:
        return
    stream = AnswerStream(AnswerForm(calls=GENERIC, tools=("f",)))
    stream.push(text)
    stream.finish()
    assert stream.finish_reason("stop") == "tool_calls"
    jsonschema.Draft202012Validator(schema).validate(json.loads(stream.calls[0].arguments))
