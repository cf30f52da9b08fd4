"""How models write thoughts and calls of tools: the families, as data.

Sources: the chat templates of the models named, and their makers' descriptions of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ThoughtForm:
    """The marks around a thought. It comes before the answer; with `anywhere`, also between its parts."""

    opening: str
    closing: str
    anywhere: bool = False
    #: What the model writes between a thought and the answer.
    after: str = ""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family writes calls.

    `object`: after the mark `opening`, {"name": …, `key`: {…}}, a list of them if `listed`, then `closing`.
    `named`: after the mark the name, `separator`, the arguments as an object, `closing`.
    """

    family: str
    kind: Literal["object", "named"]
    opening: str
    closing: str = ""
    key: str = "arguments"
    listed: bool = False
    bare: bool = False  # a call that begins the answer may be without `opening`
    separator: str = ""
    #: What may be between a name and `separator`, a regular expression, and what the model writes there.
    after_name: str = ""
    name_end: str = ""
    #: Under this name there is text, not a call.
    text_name: str | None = None
    #: What the model writes before text, and before `opening`, where the prompt does not end with it.
    text_lead: str = ""
    call_lead: str = ""
    #: Around the object, and between two calls, as the model writes it; None: it makes one call at a time.
    space: str = ""
    between: str | None = ""
    #: Marks in the text that say nothing.
    dropped: tuple[str, ...] = ()


#: The documented form for every model whose template knows nothing of tools, or writes calls in a way not listed here.
#: A model that was not taught to call tools repeats a call for ever if it may, so it makes one at a time.
GENERIC = CallForm("generic", "object", "<tool_call>", "</tool_call>", space="\n", between=None)

CALL_FORMS = (
    CallForm("hermes", "object", "<tool_call>", "</tool_call>", space="\n", between="\n"),  # also Qwen 2.5 and 3
    CallForm("mistral", "named", "[TOOL_CALLS]", separator="[ARGS]", after_name=r"(\[CALL_ID\][A-Za-z0-9]*)?"),
    CallForm("mistral-list", "object", "[TOOL_CALLS]", listed=True, between=", "),  # up to Mistral Nemo
    CallForm("functionary", "named", ">>>", separator="\n", text_name="all", text_lead="all\n"),  # version 3.2
    CallForm("functionary-tag", "named", "<function=", "</function>", separator=">"),  # version 3.1
    CallForm(
        "functionary-recipient",  # version 2
        "named",
        "<|recipient|>",
        separator="<|content|>",
        after_name=r"\n?",
        name_end="\n",
        text_name="all",
        text_lead="all\n<|content|>",
        between="\n<|from|>assistant\n",
        dropped=("\n<|from|>assistant\n", "<|stop|>"),
    ),
    CallForm(
        "harmony",  # gpt-oss
        "named",
        "to=functions.",
        separator="<|message|>",
        after_name=r"( ?<\|channel\|>commentary)?( ?<\|constrain\|>)?( ?json)?",
        name_end=" <|constrain|>json",
        text_lead="<|channel|>final<|message|>",
        call_lead="<|channel|>commentary ",
        between=None,
        dropped=(
            "<|start|>assistant",
            "<|channel|>final",
            "<|channel|>commentary",
            "<|message|>",
            "<|end|>",
            "<|call|>",
            "<|return|>",
        ),
    ),
    CallForm("llama", "object", "<|python_tag|>", key="parameters", bare=True, between=None),  # Llama 3.1 to 3.3
)

THOUGHT_FORMS = (
    ThoughtForm("<|channel|>analysis<|message|>", "<|end|>", anywhere=True, after="<|start|>assistant"),  # gpt-oss
    ThoughtForm("<think>", "</think>"),  # DeepSeek R1, Qwen 3, SmolLM 3, …
    ThoughtForm("[THINK]", "[/THINK]"),  # Magistral
    ThoughtForm("<seed:think>", "</seed:think>"),
    ThoughtForm("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ThoughtForm("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ThoughtForm("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ThoughtForm("<thinking>", "</thinking>"),
    ThoughtForm("<reasoning>", "</reasoning>"),
)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How the answer to one prompt is written. `thinking`: the prompt has opened the thought. `naming`: the prompt has
    ended with the mark of a call. `tools` are the names that may be called; whatever else looks like a call is text."""

    thought: ThoughtForm | None = None
    thinking: bool = False
    calls: CallForm | None = None
    naming: bool = False
    tools: tuple[str, ...] = ()
    #: Marks in the text that say nothing, and those the model writes before text.
    dropped: tuple[str, ...] = ()
    text_lead: str = ""

    @property
    def plain(self) -> bool:
        """Whether all of it is text."""
        return self.thought is None and self.calls is None and not self.dropped


#: All of it is text.
PLAIN = AnswerForm()
