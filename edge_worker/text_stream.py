"""From token pieces to text: whole UTF-8 characters only, and never past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Collects the bytes of generated tokens as text.

    Bytes that do not yet make a character, and characters that may yet turn out to begin a stop string, are held back.
    The result does not depend on how the bytes were cut into tokens: the stop string that is complete first ends the
    text, before its first character.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stops = tuple(stops)
        self._held = ""
        self._released: list[str] = []
        self.stopped = False
        self.length = 0  # characters seen, released or held, up to the last token's

    @property
    def text(self) -> str:
        """What was released so far."""
        return "".join(self._released)

    def push(self, piece: bytes) -> str:
        """Take one token's bytes; returns the text they release. After `stopped` nothing more is released."""
        if self.stopped:
            return ""
        decoded = self._decode(piece)
        self.length += len(decoded)
        text = self._held + decoded
        if cut := self._match(text):
            self.stopped = True
            return self._release(text[: cut[0]], "")
        keep = self._held_back(text)
        return self._release(text[: len(text) - keep], text[len(text) - keep :])

    def finish(self) -> str:
        """The generation ended: releases what was held back for a stop string that did not come. An incomplete
        character is dropped."""
        return "" if self.stopped else self._release(self._held, "")

    def _release(self, text: str, held: str) -> str:
        self._held = held
        if text:
            self._released.append(text)
        return text

    def _match(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the stop string complete first; of several complete at once, the one that began first."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
