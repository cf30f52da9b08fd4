"""One answer as a remote server streams it, in our terms."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from uuid import uuid4

from perllm.broker.chat.call_reader import is_object
from perllm.broker.messages import MAX_NAME, MAX_TOOLS, Delta, ToolCall
from perllm.cloud_worker.openai_api import ChunkDelta, Malformed, ToolCallPiece

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(slots=True)
class _Call:
    """A call of a tool, as far as it came."""

    number: int = 0
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    told: int = 0  # pieces of its arguments passed on, once its name was there


class RemoteAnswer:
    """Takes the server's pieces and gives ours; all of them together are its properties."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _Call] = {}  # by the server's index
        self._named: list[_Call] = []
        #: Tokens seen: about one for each piece.
        self.tokens = 0
        self.reasoning_tokens = 0
        #: The server's finish reason.
        self.finish: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str | None:
        """None: the server told of none."""
        return "".join(self._reasoning) if self._reasoning else None

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(ToolCall(id=c.id, name=c.name, arguments="".join(c.arguments)) for c in self._named)

    @property
    def called(self) -> bool:
        """Whether it has calls, and each with arguments that are an object."""
        return bool(self._named) and all(is_object(call.arguments) for call in self.calls)

    def take(self, delta: ChunkDelta, tokens: int) -> list[Delta]:
        """What a piece of so many tokens adds. Raises Malformed."""
        found = []
        if thought := delta.reasoning_content or delta.reasoning:
            self._reasoning.append(thought)
            found.append(Delta(index=self.index, reasoning=thought))
            self.reasoning_tokens += tokens
        if delta.content:
            self._text.append(delta.content)
            found.append(Delta(index=self.index, text=delta.content))
        for piece in delta.tool_calls or ():
            found += self._take_call(piece)
        if found:
            self.tokens += tokens
        return found

    def close(self) -> list[Delta]:
        """The server is done: a call that was given no arguments has none."""
        empty = [call for call in self._named if not call.arguments]
        for call in empty:
            call.arguments.append("{}")
        return [Delta(index=self.index, call=call.number, arguments=self._untold(call)) for call in empty]

    def _take_call(self, piece: ToolCallPiece) -> list[Delta]:
        """A call is told of once its name is known."""
        call = self._call_of(piece)
        name, arguments = piece.function.name, piece.function.arguments
        if arguments:
            call.arguments.append(arguments)
        if name and not call.name:
            if not _TOOL_NAME.fullmatch(name):
                raise Malformed(f"it called a tool by a name that none can have: {name[:80]!r}")
            call.number, call.name = len(self._named), name
            call.id = piece.id if piece.id and len(piece.id) <= MAX_NAME else f"call_{uuid4().hex[:24]}"
            self._named.append(call)
            return [Delta(index=self.index, call=call.number, id=call.id, name=name, arguments=self._untold(call))]
        if call.name and (untold := self._untold(call)):
            return [Delta(index=self.index, call=call.number, arguments=untold)]
        return []

    def _call_of(self, piece: ToolCallPiece) -> _Call:
        calls, index = self._calls, piece.index
        if index is None:  # servers that stream whole calls may leave it out
            index = max(calls, default=-1) + (1 if piece.function.name or not calls else 0)
        if index not in calls:
            if len(calls) == MAX_TOOLS:
                raise Malformed(f"it sent more than {MAX_TOOLS} calls of tools")
            calls[index] = _Call()
        return calls[index]

    @staticmethod
    def _untold(call: _Call) -> str:
        untold, call.told = "".join(call.arguments[call.told :]), len(call.arguments)
        return untold
