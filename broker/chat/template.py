"""A task's messages and tools into a prompt, by the model's own chat template.

A template is a program of the model's makers; what it takes, and how it has calls written, is found by running it: a
call is rendered, and the family is the one whose reader gets that call back. A template without tools, or with calls
that no family listed here writes, gets the generic form (docs/http-api.md): the tools described in the system turn,
calls and their results as JSON in marks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from perllm.broker.chat.forms import CALL_FORMS, GENERIC, PLAIN, THOUGHT_FORMS, AnswerForm, CallForm, ThoughtForm
from perllm.broker.chat.parser import AnswerParser
from perllm.broker.messages import Message, TaskSpec, Tool

#: (messages, tools, further variables) → text, a turn of the assistant begun. May raise anything.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]], str]

#: Variables of a template that are not a producer's to set: what the system gives, and what would change how it runs.
RESERVED = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "eos_token",
        "function_call",
        "functions",
        "max_length",
        "messages",
        "padding",
        "raise_exception",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tool_choice",
        "tools",
        "truncation",
    }
)
#: What templates know of a model's effort: other words are brought to these.
_EFFORTS = {"minimal": "low", "xhigh": "high"}
#: Some templates take ids of calls of this form only.
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


class TemplateError(ValueError):
    """The template refuses the messages; the message says why, in the words of the template's makers."""


@dataclass(frozen=True, slots=True)
class _Habits:
    """How the template wants an assistant's calls."""

    as_objects: bool  # arguments as an object, not as text
    short_ids: bool

    def id(self, given: str) -> str:
        """A call's id as the template takes it."""
        if not self.short_ids or _SHORT_ID.fullmatch(given):
            return given
        return hashlib.sha256(given.encode(errors="replace")).hexdigest()[:9]


class ChatTemplate:
    """One model's. Thread-safe as `render` is."""

    def __init__(self, source: str, render: Render) -> None:
        self._render = render
        self.thought = next((form for form in THOUGHT_FORMS if _shows(source, form)), None)
        #: Whether it renders a user's turn: some want a query and documents, or are no templates at all.
        self.chats = self._says("needle", [_turn("user", "needle")])
        self._takes_system = self._says("needle", [_turn("system", "needle"), _USER])
        tried = list(self._tried())
        found = next(((form, habits) for form, habits, _ in tried if form is not None), None)
        #: How calls are written; the generic form where `native` is False.
        self.native = found is not None
        self.calls, self._habits = found or (GENERIC, _Habits(as_objects=False, short_ids=False))
        #: How it wants calls that others than us read.
        self._foreign = next((habits for _, habits, good in tried if good), None)
        self._takes_two = self._says_two(self._foreign or self._habits)

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks that may be in an answer."""
        calls, thought = self.calls, self.thought
        of_calls = (calls.opening, calls.closing, calls.separator, calls.call_lead, calls.name_end, calls.text_lead)
        of_thought = (thought.opening, thought.closing, thought.after) if thought is not None else ()
        return tuple(mark for mark in (*of_calls, *calls.dropped, *of_thought) if mark)

    # --- what the template can do, found by trying

    def _try(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str | None:
        try:
            return self._render(messages, tools, {})
        except Exception:  # templates are programs, and this is a question
            return None

    def _says(self, what: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> bool:
        return what in (self._try(messages, tools) or "")

    def _tried(self) -> Iterator[tuple[CallForm | None, _Habits, bool]]:
        """If it takes tools and their results: the family whose reader gets back a call the template has written, the
        habits it was given in, and whether it was written as JSON or plainly."""
        if not self._says("needle", [_USER], [_tool(Tool(name="needle"))]):
            return
        opened = self._try([_USER], [_TOOL])
        for habits in (_Habits(True, False), _Habits(False, False), _Habits(True, True), _Habits(False, True)):
            call_id = _ID[:9] if habits.short_ids else _ID
            call = _calling(_Call(call_id, _TOOL_NAME, '{"key": "some value"}', habits))
            text = self._try([_USER, call], [_TOOL])
            answered = [_USER, call, _answering(call_id, "needle")]
            if text is None or not self._says("needle", answered, [_TOOL]):
                continue
            written = text.removeprefix(opened) if opened else text
            family = next((f for f in CALL_FORMS if _reads_back(f, written, naming=_names(f, opened or ""))), None)
            yield family, habits, "some value" in written and "'key'" not in written and '\\"' not in written

    def _says_two(self, habits: _Habits) -> bool:
        """Whether an assistant's turn may have several calls."""
        calls = [_Call(f"call{n}aaaa", _TOOL_NAME, f'{{"key": "value {n}"}}', habits) for n in (1, 2)]
        answers = [_answering(call.id, "needle") for call in calls]
        text = self._try([_USER, _calling(*calls), *answers], [_TOOL]) or ""
        return "value 1" in text and "value 2" in text

    # --- a task

    @property
    def takes_tools(self) -> bool:
        """Whether it takes tools by itself, in whatever form calls are then written."""
        return self._foreign is not None

    def render(self, spec: TaskSpec, *, foreign: bool = False) -> tuple[str, AnswerForm]:
        """The prompt, and how the answer to it is written. `foreign`: others read the answer, so the template's own
        words for tools are used where it `takes_tools`, whether we know the family or not. Raises TemplateError."""
        tools = spec.offered_tools
        habits = self._foreign if foreign and self._foreign is not None else self._habits if self.native else None
        messages = self._messages(spec, habits)
        described = [_tool(tool) for tool in tools] if tools and habits is not None else None
        try:
            text = self._render(messages, described, {**_effort(spec), **_without_reserved(spec.chat_template_kwargs)})
        except Exception as error:  # templates are programs; theirs are the errors
            raise TemplateError(" ".join(str(error).split())[:300] or type(error).__name__) from None
        return text, PLAIN if foreign else self._form(text, tools)

    def _form(self, prompt: str, tools: Sequence[Tool]) -> AnswerForm:
        """What the end of a prompt leaves open."""
        thought, end = self.thought, prompt.rstrip()
        thinking = thought is not None and end.endswith(thought.opening.rstrip())
        if thought is not None and not thought.anywhere and end.endswith(thought.closing):
            thought = None  # it is to answer at once
        calls = self.calls if tools or (self.native and self.calls.text_name) else None
        if clash := next((tool.name for tool in tools if tool.name == self.calls.text_name), None):
            raise TemplateError(f"this model calls text {clash!r}: no tool can have that name")
        return AnswerForm(
            thought=thought,
            thinking=thinking,
            calls=calls,
            naming=calls is not None and _names(calls, prompt),
            tools=tuple(tool.name for tool in tools),
            dropped=self.calls.dropped if self.native else (),
            text_lead=self.calls.text_lead if self.native else "",
        )

    def _messages(self, spec: TaskSpec, habits: _Habits | None) -> list[dict[str, Any]]:
        """The turns as the template takes them; in the generic form where there are no `habits` to keep to."""
        turns = spec.messages or (Message(role="user", content=spec.prompt or ""),)
        if habits is not None:
            return [said for turn in turns for said in self._native_turns(turn, habits)]
        messages = [_generic_turn(turn) for turn in turns]
        if spec.offered_tools:
            messages = self._with_system(messages, generic_instructions(spec))
        return messages

    def _native_turns(self, turn: Message, habits: _Habits) -> list[dict[str, Any]]:
        said = _plain_turn(turn)
        if turn.tool_call_id is not None:
            said["tool_call_id"] = habits.id(turn.tool_call_id)
        if not turn.tool_calls:
            return [said]
        calls = [_Call(habits.id(c.id), c.name, c.arguments, habits) for c in turn.tool_calls]
        if self._takes_two:
            return [said | _calling(*calls, content=turn.content or "")]
        return [said | _calling(call, content="" if n else turn.content or "") for n, call in enumerate(calls)]

    def _with_system(self, messages: list[dict[str, Any]], instructions: str) -> list[dict[str, Any]]:
        """The messages with these instructions in the first system turn; where the template takes none, in the user's
        first."""
        role = "system" if self._takes_system else "user"
        first = next((n for n, message in enumerate(messages) if message["role"] == role), None)
        if first is None or (role == "system" and first > 0):
            return [_turn(role, instructions), *messages]
        there = messages[first]["content"]
        text = f"{there}\n\n{instructions}" if role == "system" else f"{instructions}\n\n{there}"
        return [*messages[:first], {**messages[first], "content": text}, *messages[first + 1 :]]


# --- turns as templates take them


@dataclass(frozen=True, slots=True)
class _Call:
    id: str
    name: str
    arguments: str
    habits: _Habits

    def written(self) -> dict[str, Any]:
        arguments: Any = self.arguments
        if self.habits.as_objects:
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):  # a model wrote it, and a producer sends it back
                arguments = self.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _calling(*calls: _Call, content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [call.written() for call in calls]}


def _answering(call_id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": _TOOL_NAME}


def _tool(tool: Tool) -> dict[str, Any]:
    """As the OpenAI API has it, nothing left out: templates join these texts."""
    parameters = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": function}


_USER = _turn("user", "What now?")
_TOOL_NAME = "look_around"
_TOOL = _tool(Tool(name=_TOOL_NAME, parameters={"type": "object", "properties": {"key": {"type": "string"}}}))
_ID = "call0123456789abcdef01234567"


def _shows(source: str, form: ThoughtForm) -> bool:
    """Whether a template's source has these marks; some only take out what is before the closing one."""
    return form.closing in source and (form.closing.startswith("</") or form.opening.strip() in source)


def _reads_back(form: CallForm, written: str, *, naming: bool) -> bool:
    """Whether a reader of this family finds the call in what the template wrote."""
    thought = next((t for t in THOUGHT_FORMS if written.lstrip().startswith(t.opening)), None)
    parser = AnswerParser(
        AnswerForm(thought, False, form, naming, (_TOOL_NAME,), form.dropped), lambda number: f"id{number}"
    )
    deltas = [*parser.push(written), *parser.finish(cut=False)]
    arguments = "".join(delta.arguments for delta in deltas)
    try:
        return parser.calls == 1 and json.loads(arguments) == {"key": "some value"}
    except ValueError:
        return False


def _names(form: CallForm, prompt: str) -> bool:
    """Whether the prompt ends with the mark after which a name comes."""
    return form.kind == "named" and prompt.endswith(form.opening)


def _plain_turn(turn: Message) -> dict[str, Any]:
    said = _turn(turn.role, turn.content or "")
    if turn.name is not None:
        said["name"] = turn.name
    if turn.reasoning is not None:
        said["reasoning_content"] = said["thinking"] = turn.reasoning
    return said


def _effort(spec: TaskSpec) -> dict[str, Any]:
    """`reasoning_effort` in the words of the templates there are."""
    effort = spec.reasoning_effort
    if effort is None:
        return {}
    thinks = effort != "none"
    named = {"reasoning_effort": _EFFORTS.get(effort, effort)} if thinks else {}
    return {**named, "enable_thinking": thinks, "thinking": thinks}


def _without_reserved(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in RESERVED}


# --- the generic form


def generic_instructions(spec: TaskSpec) -> str:
    """What a model is told of its tools where its template does not."""
    tools = "\n".join(json.dumps(_tool(tool)["function"], ensure_ascii=False) for tool in spec.offered_tools)
    if spec.tool_choice == "required":
        when = "Answer with a call of a tool."
    else:
        when = "Where a tool helps, answer with a call of it and nothing else; otherwise answer in words."
    return (
        f"You can call tools. {when} A call is a JSON object in these marks, one at a time:\n"
        f'{GENERIC.opening}\n{{"name": "the tool\'s name", "arguments": {{"parameter": "value"}}}}\n{GENERIC.closing}\n'
        "Its result comes back between <tool_response> and </tool_response>. These are the tools, with JSON schemas of "
        f"their parameters:\n<tools>\n{tools}\n</tools>"
    )


def _generic_turn(turn: Message) -> dict[str, Any]:
    """Calls and their results as text."""
    said = _plain_turn(turn)
    if turn.role == "tool":
        return _turn("user", f"<tool_response>\n{turn.content or ''}\n</tool_response>")
    calls = [
        f'{GENERIC.opening}\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n{GENERIC.closing}'
        for call in turn.tool_calls
    ]
    if calls:
        said["content"] = "\n".join([*([turn.content] if turn.content else []), *calls])
    return said
