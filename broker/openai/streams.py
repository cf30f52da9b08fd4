"""What of an answer has been streamed, and what of it is left when the result is there."""

from __future__ import annotations

from collections.abc import Sequence

from perllm.broker.messages import Choice, Delta


class Sent:
    """The pieces of one answer that were sent on."""

    def __init__(self) -> None:
        self._text: dict[int, list[str]] = {}
        self._reasoning: dict[int, list[str]] = {}
        self._calls: dict[tuple[int, int], tuple[str | None, str | None, list[str]]] = {}  # id, name, arguments

    def add(self, delta: Delta) -> bool:
        """Note a piece. Returns whether it says anything."""
        if delta.call is not None:
            place = delta.index, delta.call
            new = place not in self._calls
            if new:
                self._calls[place] = delta.id, delta.name, []
            self._calls[place][2].append(delta.arguments)
            return new or bool(delta.arguments)
        said, piece = (self._reasoning, delta.reasoning) if delta.reasoning else (self._text, delta.text)
        if piece:
            said.setdefault(delta.index, []).append(piece)
        return bool(piece)

    def rest(self, choices: Sequence[Choice]) -> list[Delta] | None:
        """What is left of the answers; None where they are not what was sent: an attempt was lost half-way, and the
        next one said something else."""
        left: list[Delta] = []
        for index, choice in enumerate(choices):
            thought = "".join(self._reasoning.get(index, ()))
            text = "".join(self._text.get(index, ()))
            calls = self._rest_of_calls(index, choice)
            if calls is None or not (choice.reasoning or "").startswith(thought) or not choice.text.startswith(text):
                return None
            if reasoning := (choice.reasoning or "")[len(thought) :]:
                left.append(Delta(index=index, reasoning=reasoning))
            left += [call for call in calls if call.name is None]  # what has begun is ended before anything begins
            if text := choice.text[len(text) :]:
                left.append(Delta(index=index, text=text))
            left += [call for call in calls if call.name is not None]
        everything = {index for index, _ in self._calls} | self._text.keys() | self._reasoning.keys()
        return left if all(index < len(choices) for index in everything) else None

    def _rest_of_calls(self, index: int, choice: Choice) -> list[Delta] | None:
        left = []
        for number, call in enumerate(choice.tool_calls):
            if (sent := self._calls.get((index, number))) is None:
                left.append(Delta(index=index, call=number, id=call.id, name=call.name, arguments=call.arguments))
                continue
            identity, name, pieces = sent
            arguments = "".join(pieces)
            if (identity, name) != (call.id, call.name) or not call.arguments.startswith(arguments):
                return None
            if rest := call.arguments[len(arguments) :]:
                left.append(Delta(index=index, call=number, arguments=rest))
        known = {(index, number) for number in range(len(choice.tool_calls))}
        return None if any(place[0] == index and place not in known for place in self._calls) else left
