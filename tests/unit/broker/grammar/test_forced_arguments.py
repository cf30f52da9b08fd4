"""What an answer's grammar allows in the arguments of a call that must be."""

from __future__ import annotations

from typing import Any

import llguidance
import pytest

from perllm.broker.grammar.answer import answer_grammar
from perllm.broker.messages import TaskSpec, Tool

BYTES = llguidance.LLTokenizer("byte")
PLACE: dict[str, Any] = {"type": "object", "properties": {"place": {"type": "string"}}}


@pytest.mark.parametrize(
    ("more", "arguments", "allowed"),
    [
        ({}, '{"place": "Rome"}', True),
        ({}, "{}", True),
        ({}, '{"place": "Rome", "year": 1}', False),
        ({"required": ["place"]}, '{"place": "Rome", "year": 1}', False),
        ({"additionalProperties": True}, '{"place": "Rome", "year": 1}', True),
        ({"required": ["place", "year"]}, '{"place": "Rome", "year": 1}', True),
        ({"anyOf": [{"required": ["year"]}, {"required": ["place"]}]}, '{"place": "Rome", "year": 1}', True),
    ],
)
def test_a_call_has_what_its_schema_lists_where_that_can_be(more: Any, arguments: str, allowed: bool) -> None:
    tool = Tool(name="look", parameters=PLACE | more)
    grammar = answer_grammar(TaskSpec(prompt="x", tools=(tool,), tool_choice="required", parallel_tool_calls=False))
    assert grammar is not None
    matcher = llguidance.LLMatcher(BYTES, grammar.text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    raw = list(f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>'.encode())
    assert (matcher.try_consume_tokens(raw) == len(raw)) is allowed
