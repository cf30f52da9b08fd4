"""What of a task's text travels to the scheduler: a few words and word pairs, as 16-bit codes.

How long an answer gets shows in what is asked, so the scheduler learns output lengths from these codes
(`perllm.scheduler.csucb.text_model`). Only the words at the ends of a text are taken: there instructions stand, and
there what a template has in common; what changes with every task is mostly in the middle. All digits are alike, so that
"500 words" is like "300 words" and unlike "50 words". Codes are made with a key of the tenant's, so two tenants' are
not alike; they are no secret from who guesses the words and reads the stream, where a preview of the text stands too.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple
from zlib import crc32

from perllm.broker.messages import Explanation, TaskSpec

#: A text as the scheduler keeps it: its digest, then its codes, little-endian uint16; empty where there is none.
Sketch = bytes
DIGEST_BYTES = 8
#: Words taken of all ends together, and the most codes there are then: words, pairs, and what is no text.
END_WORDS, MAX_CODES = 24, 64
#: Characters at an end in which its words are looked for.
_END = 256
#: Letters and digits in a row; in scripts that write no spaces, each character.
_WORD = re.compile(r"[^\W\u2e80-\u9fff]+|[\u2e80-\u9fff]")
_DIGITS = str.maketrans("123456789", "000000000")
#: The same for text that is ASCII, as bytes: three times as fast.
_ASCII_WORD = re.compile(rb"\w+")
_ASCII = bytes(range(256)).lower().translate(bytes.maketrans(b"123456789", b"000000000"))
_MASK = 0xFFFFFFFF
_MOST_CHARACTERS = 4 * ((DIGEST_BYTES + 2 * MAX_CODES + 2) // 3)


def sketch_task(spec: TaskSpec) -> str:
    """A task's text as it travels: base64 of its digest and codes, at most 184 characters."""
    return sketch(spec.texts(), spec.tenant, _beside(spec))


def sketch(texts: Sequence[str], tenant: str = "default", beside: Iterable[str] = ()) -> str:
    """The same of a prompt, or of a chat's turns. `beside` names what else says something of the answer's length."""
    key = _key(tenant)
    digest = blake2b(key=key.digest, digest_size=DIGEST_BYTES)
    for text in texts:
        digest.update(text.encode(errors="replace"))
        digest.update(b"\0")
    codes = [code for end in _ends(texts) for code in _codes(end, key)]
    for name in beside:
        digest.update(name.encode(errors="replace"))
        codes.append(_code(name, key))
    codes = list(dict.fromkeys(codes))[:MAX_CODES]
    return base64.b64encode(digest.digest() + struct.pack(f"<{len(codes)}H", *codes)).decode()


def parse(text: str) -> Sketch:
    """The bytes of what `sketch` returned; none for anything else."""
    if not text or len(text) > _MOST_CHARACTERS:
        return b""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return b""
    return raw if len(raw) >= DIGEST_BYTES and len(raw) % 2 == 0 else b""


def words_by_code(spec: TaskSpec) -> dict[int, str]:
    """The words, pairs of words and other features of a task by their codes, to explain what codes say of it."""
    key = _key(spec.tenant)
    texts = spec.texts()
    found: dict[int, str] = {}
    for words in _ends(texts):
        plain = [word.decode() for word in words]
        named = [*plain, *(f"{a} {b}" for a, b in pairwise(plain))]
        for code, name in zip(_codes(words, key), named, strict=True):
            found.setdefault(code, name)
    for name in _beside(spec):
        found.setdefault(_code(name, key), name)
    return found


def with_words(why: Explanation, spec: TaskSpec) -> Explanation:
    """The explanation of a task, with the words that its length forecast is due to. They are read off the task itself,
    so nobody need keep any."""
    if why.length is None or not why.length.because:
        return why
    words = words_by_code(spec)
    because = tuple(i.model_copy(update={"words": words.get(i.code, "")}) for i in why.length.because)
    return why.model_copy(update={"length": why.length.model_copy(update={"because": because})})


class _Key(NamedTuple):
    digest: bytes
    start: int  # of crc32
    factor: int  # odd
    pair_factor: int  # odd


@lru_cache(maxsize=1024)
def _key(tenant: str) -> _Key:
    digest = blake2b(tenant.encode(), digest_size=16, person=b"perllm-text").digest()
    start, factor, pair_factor = struct.unpack("<3I", digest[:12])
    return _Key(digest, start, factor | 1, pair_factor | 1)


def _ends(texts: Sequence[str]) -> list[list[bytes]]:
    """The words at the ends of a text; of several, at the first one's start and at both ends of the last."""
    if len(texts) > 1:
        third = END_WORDS // 3
        return [_words(texts[0], third, 0)[0], *_words(texts[-1], third, third)]
    return _words(texts[0], END_WORDS // 2, END_WORDS // 2) if texts else []


def _words(text: str, first: int, last: int) -> list[list[bytes]]:
    """Its first and its last words, in one list where they meet."""
    if len(text) <= 2 * _END:
        words = _split(text)
        return [words] if len(words) <= first + last else [words[:first], words[-last:] if last else []]
    head = _split(text[:_END])[:first]
    return [head, _split(text[-_END:])[-last:]] if last else [head]


def _split(text: str) -> list[bytes]:
    if text.isascii():
        return _ASCII_WORD.findall(text.encode().translate(_ASCII))
    return [word.encode(errors="replace") for word in _WORD.findall(text.lower().translate(_DIGITS))]


def _codes(words: Sequence[bytes], key: _Key) -> list[int]:
    """The codes of the words, then of the pairs of neighbours."""
    _, start, factor, pair_factor = key
    hashes = [crc32(word, start) * factor & _MASK for word in words]
    pairs = [(a * pair_factor + b & _MASK) >> 16 for a, b in pairwise(hashes)]
    return [h >> 16 for h in hashes] + pairs


def _code(name: str, key: _Key) -> int:
    """The code of what is no text; it is like no word's."""
    return (crc32(b"\0" + name.encode(errors="replace"), key.start) * key.factor & _MASK) >> 16


def _beside(spec: TaskSpec) -> list[str]:
    """What says something of the answer's length beside the text and the fields the scheduler knows anyway."""
    found = []
    if spec.messages is not None and len(spec.messages) > 1:
        found.append(f"about {1 << len(spec.messages).bit_length() - 1} turns")
    if spec.json_schema is not None:
        found.append(f"json_schema {crc32(repr(spec.json_schema).encode(errors='replace')):x}")
    if spec.grammar is not None:
        found.append(f"grammar {crc32(spec.grammar.encode(errors='replace')):x}")
    if spec.temperature:
        found.append(f"temperature {spec.temperature:.1f}")
    if spec.stop:
        found.append("stop")
    return found
