"""One answer while it is generated: parsed, ended by stop strings, and put together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from perllm.broker.chat.forms import PLAIN, AnswerForm
from perllm.broker.chat.parser import AnswerParser
from perllm.broker.chat.stop_strings import StopStrings
from perllm.broker.messages import Delta, ToolCall

Reason = Literal["stop", "length", "tool_calls", "deadline", "cancelled"]


class Parser(Protocol):
    """What takes an answer apart: ours, or one that comes with an engine."""

    @property
    def thinking(self) -> bool:
        """Whether what comes next may be part of a thought that precedes the answer."""

    @property
    def thought(self) -> bool:
        """Whether there was a thought."""

    @property
    def complete(self) -> bool:
        """Whether every call has arguments that are an object, and has come to its end."""

    def push(self, text: str, tokens: Sequence[int] = (), /) -> list[Delta]: ...

    def finish(self, *, cut: bool) -> list[Delta]: ...


class AnswerStream:
    """Takes text as it is generated and gives the answer's pieces; all of them together are its properties.

    Stop strings end the text, and never a thought or a call. `seed` makes calls' ids: the same for the same answer,
    so that a second attempt repeats the first.
    """

    def __init__(
        self,
        form: AnswerForm = PLAIN,
        stops: Sequence[str] = (),
        seed: str = "",
        index: int = 0,
        parser: Parser | None = None,
    ) -> None:
        """`parser` is in place of the one for `form`."""
        self._seed, self.index = seed, index
        self._parser = parser or (None if form.plain else AnswerParser(form, self._call_id))
        self._stops = StopStrings(stops)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments
        #: Characters seen.
        self.length = 0
        #: Tokens of the thought.
        self.reasoning_tokens = 0

    def _call_id(self, number: int) -> str:
        return "call_" + hashlib.sha256(f"{self._seed}.{self.index}.{number}".encode()).hexdigest()[:24]

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it."""
        return self._stops.stopped

    @property
    def extent(self) -> int:
        """Characters seen that belong to the answer: what comes after them was cut off by a stop string."""
        return self.length - self._stops.cut

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str | None:
        """None: it did not think."""
        return "".join(self._reasoning) if self._parser is not None and self._parser.thought else None

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(ToolCall(id=i, name=name, arguments="".join(parts)) for i, name, parts in self._calls)

    def push(self, text: str, tokens: Sequence[int] = (0,)) -> list[Delta]:
        """Take what some tokens add. After `stopped` nothing more is given."""
        if self.stopped:
            return []
        self.length += len(text)
        if self._parser is None:
            return self._keep(Delta(index=self.index, text=said) for said in [self._stops.push(text)] if said)
        if self._parser.thinking:
            self.reasoning_tokens += len(tokens)
        deltas = self._parser.push(text, tokens)
        if not self._parser.thinking and not self._parser.thought:
            self.reasoning_tokens = 0  # what might have become one did not
        return self._keep(self._stop(deltas))

    def finish(self, *, cut: bool = False) -> list[Delta]:
        """The generation ended; `cut`: not by the model. The last pieces."""
        if self.stopped:
            return []
        last = self._stop(self._parser.finish(cut=cut)) if self._parser is not None else []
        if self._parser is not None and not self._parser.thought:
            self.reasoning_tokens = 0
        if not self.stopped and (held := self._stops.flush()):
            last.append(Delta(index=self.index, text=held))
        return self._keep(last)

    def finish_reason(self, reason: Reason) -> Reason:
        """Why it ended, given why the generation did: with calls that are all complete, for them."""
        called = bool(self._calls) and self._parser is not None and self._parser.complete
        return "tool_calls" if reason == "stop" and called else reason

    def _stop(self, deltas: Iterable[Delta]) -> list[Delta]:
        """Cut text at a stop string; what was held back for one goes before what is no text."""
        out = []
        for delta in deltas:
            said = self._stops.push(delta.text) if delta.text else self._stops.flush()
            if said:
                out.append(Delta(index=self.index, text=said))
            if self.stopped:
                break
            if not delta.text:
                out.append(delta.model_copy(update={"index": self.index}))
        return out

    def _keep(self, deltas: Iterable[Delta]) -> list[Delta]:
        kept = list(deltas)
        for delta in kept:
            if delta.call is None:
                (self._reasoning if delta.reasoning else self._text).append(delta.reasoning or delta.text)
            elif delta.name is not None:
                self._calls.append((delta.id or "", delta.name, [delta.arguments]))
            else:
                self._calls[delta.call][2].append(delta.arguments)
        return kept
