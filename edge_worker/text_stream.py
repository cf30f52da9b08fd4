"""From tokens to an answer: whole UTF-8 characters only, taken apart into thought, text and calls of tools."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

from perllm.broker.chat import PLAIN, AnswerForm, AnswerStream
from perllm.broker.messages import Delta


class TextStream(AnswerStream):
    """Collects generated tokens, each by its bytes. Bytes that do not yet make a character are held back; the answer
    does not depend on how they were cut into tokens.

    `marks` are the control tokens that mean something to `form`, and what they are called: all others have no bytes.
    """

    def __init__(
        self,
        stops: Sequence[str] = (),
        form: AnswerForm = PLAIN,
        marks: Mapping[int, bytes] | None = None,
        seed: str = "",
        index: int = 0,
    ) -> None:
        super().__init__(form, stops, seed, index)
        self._marks = marks or {}
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def take(self, token: int, piece: bytes) -> list[Delta]:
        """Take one token; returns the pieces of the answer it releases. After `stopped` there are none."""
        return self.push(self._decode(piece or self._marks.get(token, b"")), (token,))
