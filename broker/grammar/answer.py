"""The grammar of an answer, in Lark as llguidance reads it: a thought where the model thinks, then text, a document
that keeps to a schema or grammar, or calls of tools.

A call's name is that of a tool that may be called, and its arguments are an object that keeps to the tool's schema:
where a call is required, where the tool is strict; else any object. Free text is free up to the mark of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from perllm.broker.chat import AnswerForm
from perllm.broker.chat.forms import GENERIC, CallForm, ThoughtForm
from perllm.broker.errors import InvalidTask
from perllm.broker.grammar.gbnf import BadGBNF, quoted, to_lark
from perllm.broker.grammar.schema import BadSchema, prepared
from perllm.broker.messages import MAX_TOOLS, TaskSpec, Tool

#: White space that schemas allow between the parts of a document: a small model would go on with it for ever.
WHITE_SPACE = r" |\n{1,2}[ \t]{0,20}"
_HEAD = '%llguidance {"no_forcing": true}'  # forcing would compute all that is certain to follow, however much it is
_OPTIONS = {"whitespace_pattern": WHITE_SPACE, "lenient": False}
_ANY = "(?s:.*)"


@dataclass(slots=True)
class AnswerGrammar:
    """Lark, line by line, and which field of the task a line stands for."""

    lines: list[str] = field(default_factory=lambda: [_HEAD])
    fields: dict[int, str] = field(default_factory=dict)  # line, from 1

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def add(self, rule: str, body: str, of: str | None = None) -> str:
        """Write a rule; returns its name."""
        self.lines.append(f"{rule}: {body}")
        if of is not None:
            self.fields[len(self.lines)] = of
        return rule.partition("[")[0]


def answer_grammar(
    spec: TaskSpec, form: AnswerForm | None = None, controls: Mapping[str, int] | None = None
) -> AnswerGrammar | None:
    """The grammar of the task's answer, None where all text is allowed. `form` is how the model writes it, the generic
    form unless given; `controls` are marks that are one control token in this model, which text never spells. Raises
    InvalidTask, naming the field."""
    if form is None:
        form = AnswerForm(calls=GENERIC if spec.offered_tools else None)
    if spec.grammar is None and spec.json_schema is None and not spec.offered_tools:
        return None
    return _Writer(spec, form, controls or {}).write()


def keeps(spec: TaskSpec, tool: Tool) -> bool:
    """Whether what a call of this tool is given must keep to the tool's schema."""
    return tool.strict or spec.tool_choice == "required"


def is_held(spec: TaskSpec) -> bool:
    """Whether the answer must keep to a grammar, or to any schema."""
    given = spec.grammar is not None or spec.json_schema is not None
    return given or any(keeps(spec, tool) for tool in spec.offered_tools)


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, which are always an object."""
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {**tool.parameters, "type": "object"}


class _Writer:
    def __init__(self, spec: TaskSpec, form: AnswerForm, controls: Mapping[str, int]) -> None:
        self._spec, self._form, self._controls = spec, form, controls
        self._out = AnswerGrammar()
        self._thought_possible = form.thought is not None and not form.thinking

    def write(self) -> AnswerGrammar:
        spec, thought = self._spec, self._form.thought
        self._out.add("TEXT", f"/{_ANY}/")
        answers = []
        if spec.offered_tools:
            answers += self._calls()
        if not spec.offered_tools or spec.tool_choice != "required":
            answers.append(self._answer())
        start = answer = self._out.add("answer", " | ".join(answers))
        if thought is not None:
            again = f"({self._mark(thought.opening)} thought)"
            times = "*" if thought.anywhere else "" if self._form.thinking else "?"
            begins = f"thought {again}*" if self._form.thinking and thought.anywhere else "thought"
            start = f"{begins} {answer}" if self._form.thinking else f"{again}{times} {answer}"
            self._out.add("thought", f"{self._until('thinking', 'TEXT', thought.closing)} {self._after(thought)}")
        self._out.add("start", start)
        return self._out

    def _after(self, thought: ThoughtForm) -> str:
        return self._mark(thought.after) if thought.after else r"/\n{0,2}/"

    # --- what is no call

    def _answer(self) -> str:
        """The document asked for, or any text."""
        spec, lead = self._spec, self._mark(self._form.text_lead)
        if spec.grammar is not None:
            try:
                rules = to_lark(spec.grammar, start="document")
            except BadGBNF as error:
                raise InvalidTask(f"grammar: {error}") from None
            self._out.lines += rules.splitlines()
            self._out.fields |= dict.fromkeys(range(1, len(self._out.lines) + 1), "grammar")
            return f"{lead} document"
        if spec.json_schema is not None:
            self._out.add("document", _json(spec.json_schema, "json_schema"), "json_schema")
            return f"{lead} document"
        return f"{lead} {self._text()}"

    def _text(self) -> str:
        """Any text that does not begin as what is not text."""
        begins = []
        thought, calls = self._form.thought, self._form.calls
        if self._thought_possible and thought is not None and thought.opening not in self._controls:
            begins.append(rf"\s*{_escaped(thought.opening)}")
        if calls is not None and calls.bare:
            names = "|".join(_escaped(tool.name) for tool in self._spec.offered_tools)
            begins.append(rf'\s*\{{"name": "({names})"')
        if not begins:
            return "TEXT"
        if not any(line.startswith("FIRST:") for line in self._out.lines):
            self._out.add("FIRST", " & ".join([f"/{_ANY}/", *(f"~/(?s:{begin}.*)/" for begin in begins)]))
        return "FIRST"

    # --- calls

    def _calls(self) -> list[str]:
        """The ways in which an answer with calls begins; each goes on to its end."""
        spec, calls = self._spec, self._form.calls
        assert calls is not None
        required = spec.tool_choice == "required" or spec.json_schema is not None or spec.grammar is not None
        offered = spec.offered_tools
        tools = [(t.name, self._arguments(number, t)) for number, t in enumerate(spec.tools) if t in offered]
        write = self._listed if calls.listed else self._object if calls.kind == "object" else self._named
        return write(calls, tools, required)

    def _arguments(self, number: int, tool: Tool) -> str:
        if keeps(self._spec, tool):
            field = f"tools.{number}.parameters"
            return self._out.add(f"arguments{number}", _json(arguments_schema(tool), field), field)
        if not any(line.startswith("object:") for line in self._out.lines):
            self._out.add("object", _json({"type": "object"}, "tools"))
        return "object"

    def _more(self, call: str, calls: CallForm) -> str:
        """Further calls, each as `call` is written."""
        if not self._spec.parallel_tool_calls or calls.between is None:
            return ""
        return f"({call}){{0,{MAX_TOOLS - 1}}}"

    def _object(self, calls: CallForm, tools: list[tuple[str, str]], required: bool) -> list[str]:
        heads = [quoted(f'{{"name": {json.dumps(name)}, "{calls.key}": ') for name, _ in tools]
        bodies = (f'{head} {arguments} "}}"' for head, (_, arguments) in zip(heads, tools, strict=True))
        self._out.add("call", " | ".join(bodies))
        space = f"/({_escaped(calls.space)})?/" if calls.space else ""
        body = f"{space} call {space} {self._mark(calls.closing)}"
        opening = self._mark(calls.opening)
        if calls.bare:  # alone, or after its mark where that cannot be text
            marked = f"{opening}?" if not required and self._is_control(calls.opening) else ""
            return [f"{marked} {body}"]
        more = self._more(f"{quoted(calls.between) if calls.between else ''} {opening} {body}", calls)
        first = opening if required else self._until("heading", self._text(), calls.opening)
        return [f"{first} {body} {more}"]

    def _listed(self, calls: CallForm, tools: list[tuple[str, str]], required: bool) -> list[str]:
        heads = [quoted(f'{{"name": {json.dumps(name)}, "{calls.key}": ') for name, _ in tools]
        bodies = (f'{head} {arguments} "}}"' for head, (_, arguments) in zip(heads, tools, strict=True))
        self._out.add("call", " | ".join(bodies))
        first = self._mark(calls.opening) if required else self._until("heading", self._text(), calls.opening)
        more = self._more(f"{quoted(calls.between or '')} call", calls)
        return [f'{first} / ?/ "[" call {more} "]"']

    def _named(self, calls: CallForm, tools: list[tuple[str, str]], required: bool) -> list[str]:
        lead, opening = self._mark(calls.call_lead), self._mark(calls.opening)
        separator = self._mark(calls.name_end + calls.separator)
        bodies = [f"{quoted(name)} {separator} {arguments} {self._mark(calls.closing)}" for name, arguments in tools]
        self._out.add("call", " | ".join(bodies))
        more = self._more(f"{quoted(calls.between) if calls.between else ''} {opening} call", calls)
        at_once = f"call {more}" if self._form.naming else f"{lead} {opening} call {more}"
        if required or calls.call_lead:
            return [at_once]
        if self._is_control(calls.opening):
            return [f"{self._mark(self._form.text_lead)} {self._text()} {opening} call {more}", at_once]
        # a mark that text may well spell: a call begins with the name of a tool after it
        ways = [at_once] if self._form.naming or self._form.text_lead else []
        for number, (name, arguments) in enumerate(tools):
            begins = f"{calls.opening}{name}{calls.name_end}{calls.separator}"
            head = self._until(f"heading{number}", self._text(), begins)
            ways.append(f"{self._mark(self._form.text_lead)} {head} {arguments} {self._mark(calls.closing)} {more}")
        return ways

    # --- marks

    def _is_control(self, mark: str) -> bool:
        return bool(self._controls) and any(mark.startswith(name) for name in self._controls)

    def _mark(self, text: str) -> str:
        """A fixed text, the control tokens in it as such."""
        if not self._controls:
            return quoted(text) if text else ""
        parts = re.split("|".join(f"({re.escape(name)})" for name in self._controls), text)
        parts = [part for part in parts if part]
        return " ".join(f"<[{self._controls[part]}]>" if part in self._controls else quoted(part) for part in parts)

    def _until(self, rule: str, text: str, mark: str) -> str:
        """Any text up to and with this mark."""
        if self._is_control(mark):
            return f"{text} {self._mark(mark)}"
        return self._out.add(f"{rule}[lazy]", f"{text} {quoted(mark)}")


def _json(schema: Mapping[str, Any], of: str) -> str:
    try:
        schema = prepared(schema)
    except BadSchema as error:
        raise InvalidTask(f"{of}: cannot be used: {error}") from None
    return f"%json {json.dumps({**schema, 'x-guidance': _OPTIONS}, ensure_ascii=False)}"


def _escaped(text: str) -> str:
    """A text as a regular expression."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)
