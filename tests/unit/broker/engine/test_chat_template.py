"""What is seen of a chat template: by rendering it, so that a name in a comment is not mistaken for a feature."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from perllm.broker.engine.chat_template import NO_TEMPLATE, TemplateFacts, look_at_template, thinks


def look(source: str) -> TemplateFacts:
    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return jinja2.Environment().from_string(source).render(messages=messages, tools=tools)

    return look_at_template(source, render)


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOOLS = "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}" + TURNS
THINKS = TURNS + "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<x>{% endif %}"


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        (TURNS, TemplateFacts(chats=True, shows_tools=False, thinks=False)),
        (TOOLS, TemplateFacts(chats=True, shows_tools=True, thinks=False)),
        (THINKS, TemplateFacts(chats=True, shows_tools=False, thinks=True)),
        (TURNS + "<think>\n", TemplateFacts(chats=True, shows_tools=False, thinks=True)),
        # Names that only look like it
        (TURNS + "{# tools, <|tool|> #}", TemplateFacts(chats=True, shows_tools=False, thinks=False)),
        ("Be careful when thinking. " + TURNS, TemplateFacts(chats=True, shows_tools=False, thinks=False)),
        (TURNS + "{{ 'a</think>b'.split('</think>')[-1] }}",
         TemplateFacts(chats=True, shows_tools=False, thinks=False)),
        # Templates that are none, or want something else than a chat
        ("", NO_TEMPLATE),
        ("{% for m in", NO_TEMPLATE),
        ("{{ 1 / 0 }}", NO_TEMPLATE),
        ("{{ query }} {{ document }}", NO_TEMPLATE),
        # One that refuses tools is a chat all the same
        ("{% if tools %}{{ 1 / 0 }}{% endif %}" + TURNS, TemplateFacts(chats=True, shows_tools=False, thinks=False)),
    ],
)  # fmt: skip
def test_a_template_is_known_by_what_it_renders(source: str, seen: TemplateFacts) -> None:
    assert look(source) == seen


@pytest.mark.parametrize(
    ("source", "does"),
    [
        ("{%- if thinking %}x{% endif %}", True),
        ("{% set e = reasoning_effort | default('medium') %}", True),
        ("<|START_THINKING|>", True),
        ("[THINK]", True),
        ("rethinking {{ messages }}", False),
    ],
)
def test_thinking_is_known_by_its_marks_and_switches(source: str, does: bool) -> None:
    assert thinks(source) is does
