"""Embeddings as they travel: base64 of little-endian 32-bit floats, as in the OpenAI API."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable

#: Bytes of base64 one number takes, about.
BYTES_PER_NUMBER = 16 / 3


def pack(vector: Iterable[float]) -> str:
    """The numbers as text."""
    numbers = vector if isinstance(vector, array) and vector.typecode == "f" else array("f", vector)
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def unpack(text: str) -> array[float]:
    """The numbers in what `pack` returned. Raises ValueError for anything else."""
    numbers = array("f")
    numbers.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def as_json(vector: array[float]) -> str:
    """A vector as a JSON array: nine digits, with which a 32-bit float is the same when it is read again."""
    return "[" + ",".join(["%.9g"] * len(vector)) % tuple(vector) + "]"
