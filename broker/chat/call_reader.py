"""One call of a tool, character by character: the name as soon as it is there, the arguments as they come.

What is read is what a model writes, so anything may come; nothing here recurses or raises.
"""

from __future__ import annotations

import json
import re
from typing import Literal, Protocol

from perllm.broker.chat.forms import CallForm

#: Most characters of what comes before a call's arguments.
MAX_HEAD = 4096
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_SPACE = " \t\r\n"

#: `done`: the call is complete. `broken`: it is no call. `text`: a piece of text begins here instead.
Status = Literal["reading", "done", "broken", "text"]


class CallReader(Protocol):
    """Takes characters until its status is another than `reading`. The one that made it `broken` was not taken."""

    status: Status
    name: str | None

    def take(self, character: str) -> str:
        """Returns what it adds to the arguments, once the name is known."""


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):  # also a number of more digits than Python reads
        return False


class _Value:
    """The extent of one JSON value. A number or word ends before the character after it, all else with its last one."""

    def __init__(self, first: str) -> None:
        self._depth = 1 if first in "{[" else 0
        self._quoted = first == '"'
        self._escaped = False
        self._bare = not self._depth and not self._quoted

    def take(self, character: str) -> Literal["inside", "last", "after"]:
        if self._bare:
            return "after" if character in ",]}" or character in _SPACE else "inside"
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._quoted = False
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return "last" if not self._depth and not self._quoted else "inside"


class ObjectReader:
    """{"name": …, "arguments": {…}}, the keys in any order, others beside them."""

    def __init__(self, form: CallForm) -> None:
        self.status: Status = "reading"
        self.name: str | None = None
        self._listed = form.listed
        self._state: Literal["before", "member", "key", "colon", "value", "inside"] = "before"
        self._key = ""
        self._value: _Value | None = None
        self._text: list[str] = []  # of the key or value that is being read
        self._arguments: list[str] = []  # until the name is known
        self._streams = False  # the value being read is the arguments', an object
        self._given = False  # there were arguments
        self._read = 0

    def take(self, character: str) -> str:
        if self.name is None:
            self._read += 1
            if self._read > MAX_HEAD:
                self.status = "broken"
                return ""
        if self._state == "inside":
            return self._take_value(character)
        if self._state == "key":
            self._text.append(character)
            assert self._value is not None
            if self._value.take(character) == "last":
                self._key, self._state = str(self._loaded()), "colon"
            return ""
        if character in _SPACE:
            return ""
        match self._state, character:
            case "before", "{":
                self._state = "member"
            case "before", "[" if self._listed:
                self._listed = False
            case "member", '"':
                self._begin(character, "key")
            case "member", ",":
                pass
            case "member", "}":
                return self._end()
            case "colon", ":":
                self._state = "value"
            case "value", _ if character not in ",:]}":
                self._streams = self._key in ("arguments", "parameters") and character == "{"
                self._given = self._given or self._key in ("arguments", "parameters")
                self._begin(character, "inside")
                return self._pass_on(character) if self._streams else ""
            case _:
                self.status = "broken"
        return ""

    def _begin(self, character: str, state: Literal["key", "inside"]) -> None:
        self._state, self._value, self._text = state, _Value(character), [character]

    def _take_value(self, character: str) -> str:
        assert self._value is not None
        extent = self._value.take(character)
        if extent != "after" and not self._streams:
            self._text.append(character)
        added = self._pass_on(character) if self._streams else ""
        if extent == "inside":
            return added
        self._state = "member"
        if not self._streams:
            added = self._take_whole()
        if extent == "after" and self.status == "reading":
            added += self.take(character)
        return added

    def _take_whole(self) -> str:
        """A value that is not passed on as it comes: the name, arguments as a string, or something else."""
        if self._key not in ("name", "arguments", "parameters"):
            return ""
        value = self._loaded()
        if self._key == "name":
            if not isinstance(value, str) or self.name is not None:
                self.status = "broken"
                return ""
            self.name = value
            waiting, self._arguments = "".join(self._arguments), []
            return waiting
        if value is None:
            value = "{}"
        if not isinstance(value, str) or not is_object(value):
            self.status = "broken"
            return ""
        return self._pass_on(value)

    def _pass_on(self, text: str) -> str:
        if self.name is not None:
            return text
        self._arguments.append(text)
        return ""

    def _loaded(self) -> object:
        try:
            return json.loads("".join(self._text))
        except (ValueError, RecursionError):
            self.status = "broken"
            return ""

    def _end(self) -> str:
        if self.name is None:
            self.status = "broken"
            return ""
        self.status = "done"
        return "" if self._given else "{}"


class NamedReader:
    """The name, a separator, the arguments as an object."""

    def __init__(self, form: CallForm) -> None:
        self.status: Status = "reading"
        self.name: str | None = None
        self._form = form
        self._after = re.compile(form.after_name)
        self._head = ""
        self._value: _Value | None = None

    def take(self, character: str) -> str:
        if self._value is not None:
            if self._value.take(character) == "last":
                self.status = "done"
            return character
        if self.name is None:
            self._head += character
            self._look()
        elif character == "{":
            self._value = _Value(character)
            return character
        elif character not in _SPACE:
            self.status = "broken"
        return ""

    def _look(self) -> None:
        """Whether the name is complete, or can no longer be one."""
        form = self._form
        if self._head.endswith(form.separator):
            head = self._head.removesuffix(form.separator)
            found = _NAME.match(head)
            if found is None or not self._after.fullmatch(head, found.end()):
                self.status = "broken"
            elif found[0] == form.text_name:
                self.status = "text"
            else:
                self.name = found[0]
        elif len(self._head) > MAX_HEAD or (not form.after_name and not self._may_go_on()):
            self.status = "broken"

    def _may_go_on(self) -> bool:
        found = _NAME.match(self._head)
        if found is None:
            return False
        rest = self._head[found.end() :]
        return self._form.separator.startswith(rest)


def reader(form: CallForm) -> CallReader:
    """For the call that comes next."""
    return ObjectReader(form) if form.kind == "object" else NamedReader(form)
