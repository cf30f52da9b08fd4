"""What a model's chat template can do, found by rendering it and by the marks in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

#: Messages and tools (both as the OpenAI API has them) to text. Raises whatever the template raises.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]

#: Between which marks models think, as their templates spell them. A template that only names the second one strips
#: the thoughts of others.
THINKING_MARKS = (
    ("<think>", "</think>"),  # DeepSeek R1, Qwen 3, GLM 4.5, SmolLM3, …
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel|>analysis", "<|end|>"),  # gpt-oss
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)
#: What templates call the switch of a model that can think and need not.
_SWITCHES = re.compile(r"\b(?:enable_thinking|thinking|reasoning_effort|thinking_budget)\b")

_USER = [{"role": "user", "content": "Which weather?"}]
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_at_the_sky",
        "description": "Says which weather it is.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


class TemplateFacts(NamedTuple):
    """What was seen of a template."""

    chats: bool  # it renders a user's turn
    shows_tools: bool  # the model gets to see the tools
    thinks: bool  # it knows of thoughts apart from the answer, or of a switch for them


NO_TEMPLATE = TemplateFacts(chats=False, shows_tools=False, thinks=False)


def look_at_template(source: str | None, render: Render) -> TemplateFacts:
    """What this template can do; of one that cannot be rendered, nothing."""
    if not source or not _says(render, "Which weather?", None):
        return NO_TEMPLATE
    shows_tools = _says(render, "look_at_the_sky", [_TOOL])
    return TemplateFacts(chats=True, shows_tools=shows_tools, thinks=thinks(source))


def thinks(source: str) -> bool:
    """Whether a model with this template thinks before it answers, or can."""
    code = " ".join(re.findall(r"\{[{%].*?[%}]\}", source, re.DOTALL))  # not what it only says
    return _SWITCHES.search(code) is not None or any(begins in source for begins, _ in THINKING_MARKS)


def _says(render: Render, what: str, tools: list[dict[str, Any]] | None) -> bool:
    try:
        return what in render([dict(turn) for turn in _USER], tools)
    except Exception:  # templates are programs; theirs are the errors
        return False
