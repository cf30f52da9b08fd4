"""What a model writes, into its thought, its text and its calls of tools, while it writes.

The result does not depend on how the text was cut into pieces. What may yet turn out to be a mark is held back, so that
no half of one is ever passed on; what looks like a call and is none is text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from perllm.broker.chat.call_reader import CallReader, is_object, reader
from perllm.broker.chat.forms import AnswerForm
from perllm.broker.chat.stop_strings import held_back
from perllm.broker.messages import Delta


class AnswerParser:
    """Takes text, gives pieces. `call_id` makes the id of a call of its number."""

    def __init__(self, form: AnswerForm, call_id: Callable[[int], str]) -> None:
        self._form, self._call_id = form, call_id
        thought, calls = form.thought, form.calls
        self._marks = (calls.opening, *form.dropped) if calls else form.dropped
        if thought is not None and thought.anywhere:
            self._marks = (thought.opening, *self._marks)
        self._rest = ""  # not decided on yet
        self._out: list[Delta] = []
        self._step: Callable[[bool], bool] = self._begin
        self._cut = False  # at the end: whether the model was interrupted
        #: Whether what comes next may be part of a thought that precedes the answer.
        self.thinking = thought is not None
        #: Whether there was a thought.
        self.thought = form.thinking
        #: How many calls were begun, and whether each of them came to its end.
        self.calls = 0
        self.complete = True
        if form.thinking:
            self._enter_thought()
        elif thought is None:
            self._step = self._answer
        self._text_since_call = False
        self._reader: CallReader | None = None
        self._announced = False  # the call's name was passed on
        self._raw = ""  # what was read of a call before
        self._arguments: list[str] = []

    def push(self, text: str, _: Sequence[int] = ()) -> list[Delta]:
        """Returns the pieces that are certain by it, whatever its tokens."""
        self._rest += text
        return self._run(end=False)

    def finish(self, *, cut: bool) -> list[Delta]:
        """The model has ended, or (`cut`) was interrupted: the last pieces. A call that was cut before its name was
        there, and half of a mark, are left out."""
        self._cut = cut
        return self._run(end=True)

    def _run(self, *, end: bool) -> list[Delta]:
        while self._step(end):
            pass
        out, self._out = self._out, []
        return out

    # --- the thought

    def _begin(self, end: bool) -> bool:
        """Before anything is known: a thought, or the answer."""
        assert self._form.thought is not None
        mark, text = self._form.thought.opening, self._rest.lstrip()
        if text.startswith(mark):
            self._rest = text[len(mark) :]
            self._enter_thought()
            return True
        if mark.startswith(text):
            if not end:
                return False
            if self._cut:
                self._rest = ""
        self.thinking, self._step = False, self._answer
        return True

    def _enter_thought(self) -> None:
        self.thought, self._step, self._thought_text = True, self._think, False

    def _think(self, end: bool) -> bool:
        assert self._form.thought is not None
        mark, text = self._form.thought.closing, self._rest
        if not self._thought_text:
            text = text.lstrip()
        found = text.find(mark)
        if found >= 0:
            self._add_reasoning(text[:found].rstrip())
            self._rest = text[found + len(mark) :]
            self._step = self._after_thought
            return True
        half = held_back(text, (mark,))
        whole = text[: len(text) - half]
        said = whole.rstrip()
        self._add_reasoning(said)
        self._rest = text[len(said) :]
        if end:
            if half and not self._cut:
                self._add_reasoning(self._rest)
            self._rest = ""
        return False

    def _add_reasoning(self, text: str) -> None:
        if text:
            self._thought_text = True
            self._out.append(Delta(reasoning=text))

    def _after_thought(self, _: bool) -> bool:
        self.thinking = False
        self._rest = self._rest.lstrip()
        if self._rest:
            self._step = self._answer
        return bool(self._rest)

    # --- the text

    def _answer(self, end: bool) -> bool:
        """At the answer's first character."""
        calls = self._form.calls
        if calls is not None and self._form.naming:
            self._enter_call("", "")
            return True
        text = self._rest.lstrip()
        if calls is not None and calls.bare:
            if not text and not end:
                return False
            if text.startswith("{"):
                before, self._rest = self._rest[: len(self._rest) - len(text)], text
                self._enter_call(before, "")
                return True
        self._step = self._text
        return True

    def _text(self, end: bool) -> bool:
        text, calls = self._rest, self._form.calls
        if not self._marks:
            self._add_text(text)
            self._rest = ""
            return False
        found = min(((at, mark) for mark in self._marks if (at := text.find(mark)) >= 0), default=None)
        if found is not None:
            at, mark = found
            before, self._rest = text[:at], text[at + len(mark) :]
            if calls is not None and mark == calls.opening:
                said = before.rstrip()
                self._add_text(said)
                self._enter_call(before[len(said) :], mark)
                return True
            self._add_text(before)
            if mark not in self._form.dropped:
                self._enter_thought()
            return True
        half = held_back(text, self._marks)
        said = text[: len(text) - half].rstrip()  # blanks before a call are no text
        self._add_text(said)
        self._rest = text[len(said) :]
        if end:
            rest = self._rest[: len(self._rest) - half] if self._cut else self._rest
            if rest.strip() or not self.calls or self._text_since_call:
                self._add_text(rest)
            self._rest = ""
        return False

    def _add_text(self, text: str) -> None:
        if text:
            self._text_since_call = True
            self._out.append(Delta(text=text))

    # --- calls

    def _enter_call(self, before: str, mark: str) -> None:
        """What comes is read as a call. `before` and `mark` are text if it is none."""
        assert self._form.calls is not None
        self._before, self._mark, self._raw = before, mark, ""
        self._reader, self._announced, self._arguments = reader(self._form.calls), False, []
        self._step = self._call

    def _call(self, end: bool) -> bool:
        assert self._reader is not None
        one, text = self._reader, self._rest
        added: list[str] = []
        read = 0
        for character in text:
            piece = one.take(character)
            if one.status == "broken":
                break
            read += 1
            if piece:
                added.append(piece)
            if one.status != "reading" or (one.name is not None and not self._announced):
                break
        self._rest = text[read:]
        if not self._announced:
            self._raw += text[:read]
            if one.name is not None and one.status != "broken":
                if one.name not in self._form.tools:
                    return self._no_call()
                self._announce(one.name)
        if added:
            self._arguments += added
            self._out.append(Delta(call=self.calls - 1, arguments="".join(added)))
        match one.status:
            case "broken":
                return self._broken()
            case "text":
                self._reader, self._step = None, self._text
                return True
            case "done":
                if not is_object("".join(self._arguments)):
                    self.complete = False
                self._reader, self._step = None, self._after_call
                return True
        if self._rest:
            return True  # the name was found, more is there
        if end and not self._announced:
            return self._end_unnamed()
        if end:
            self.complete = False
        return False

    def _announce(self, name: str) -> None:
        self._announced, self._raw, self._text_since_call = True, "", False
        self._out.append(Delta(call=self.calls, id=self._call_id(self.calls), name=name))
        self.calls += 1

    def _no_call(self) -> bool:
        """It only looked like a call. What follows its mark is looked at again: it may hold another."""
        self._add_text(self._before + self._mark)
        self._rest = self._raw + self._rest
        self._reader, self._raw, self._step = None, "", self._text
        return True

    def _broken(self) -> bool:
        """What can belong to no call."""
        if not self._announced:
            return self._no_call()
        self.complete = False
        self._reader, self._step = None, self._text
        return True

    def _end_unnamed(self) -> bool:
        if not self._cut:
            self._add_text(self._before + self._mark + self._raw)
        self._reader, self._raw, self._step = None, "", self._text
        return False

    def _after_call(self, end: bool) -> bool:
        """A call is over: its closing mark, or in a list the next one."""
        calls = self._form.calls
        assert calls is not None
        text = self._rest.lstrip()
        if not text:
            if end:
                self._rest = ""
            return False
        closing = "]" if calls.listed else calls.closing
        if calls.listed and text[0] in ",;":
            self._rest = text[1:]
            self._enter_call("", text[0])
            return True
        if closing and text.startswith(closing):
            self._rest = text[len(closing) :]
        elif closing and closing.startswith(text):
            if not end:
                return False
            if self._cut:
                self._rest = ""
        self._step = self._text
        return True
