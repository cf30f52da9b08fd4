"""Stop strings: where text ends, and what may be said of it before that is known."""

from __future__ import annotations

from collections.abc import Sequence


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `marks` and is not all of it."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) and len(mark) > length for mark in marks):
            return length
    return 0


class StopStrings:
    """Releases text up to the first stop string.

    Characters that may yet turn out to begin a stop string are held back. The result does not depend on how the text
    was cut into pieces: the stop string that is complete first ends the text, before its first character.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        #: Characters of the text taken that do not belong to it: the stop string and what came with its end.
        self.cut = 0

    def push(self, text: str) -> str:
        """Returns what it releases. After `stopped` nothing more is released."""
        if self.stopped:
            return ""
        text = self._held + text
        if cut := self._match(text):
            self.stopped, self.cut, self._held = True, len(text) - cut[0], ""
            return text[: cut[0]]
        keep = held_back(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text is interrupted, or over: what was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the stop string complete first; of several complete at once, the one that began first."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end
