"""Bringing a document to its end before its tokens run out.

A small model may go on in a string or a list for ever. What it writes under a grammar is then of no use at all, since
half a document is none; so close to the limit a short way to the end is taken, and the finish reason says so.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from perllm.edge_worker.llama import Model

Ids = npt.NDArray[np.intp]
Allowed = npt.NDArray[np.bool_]
#: Tokens before the limit from which on the way to the end is looked at, and the longest way that is followed.
WINDOW = 384
#: Tokens kept free beyond those the way takes.
SPARE = 6
#: CPU time a request may spend on looking, s: others in the batch wait meanwhile.
PATIENCE = 1.0
#: Characters, and texts at most, that are tried to find the end of a number, or of a string with a pattern.
SEARCH_DEPTH, SEARCHED = 3, 500


class Strings:
    """Whether what was written so far ends within a JSON string."""

    def __init__(self, inside: bool = False, escaped: bool = False) -> None:
        self.inside, self.escaped = inside, escaped

    def take(self, piece: bytes) -> None:
        for byte in piece:
            if self.escaped:
                self.escaped = False
            elif self.inside and byte == ord("\\"):
                self.escaped = True
            elif byte == ord('"'):
                self.inside = not self.inside

    def copy(self) -> Strings:
        return Strings(self.inside, self.escaped)


class Endings:
    """A model's tokens by what they do to a JSON document: how its end is reached from anywhere in it."""

    def __init__(self, model: Model) -> None:
        self.pieces = [model.piece(token) for token in range(model.vocab_size)]
        self._length = np.array([len(piece) for piece in self.pieces])
        ends = np.array([token for token in range(model.vocab_size) if model.ends(token)], np.intp)
        quotes = self._where(lambda piece: piece.startswith(b'"') and not piece.strip(b'"]}'))
        closes = self._where(lambda piece: not piece.strip(b"]}") or piece in (b"{}", b"[]"))
        links = self._where(lambda piece: piece[:1] in b",:" and not piece.strip(b' ",:]}'))
        #: Each group is better than the next, inside a string and outside.
        self._groups = {True: [ends, quotes], False: [ends, closes, quotes, links]}
        #: What leads away from the end: more depth, white space, and escapes.
        self._away = self._where(lambda piece: piece[:1] in b" \t\r\n{[" or b"\\" in piece)
        single = self._where(lambda piece: len(piece) == 1 and piece.isascii() and piece != b"\\")
        #: Characters to try, likewise.
        self._characters = {True: single, False: np.setdiff1d(single, self._away)}

    def _where(self, fits: Callable[[bytes], bool]) -> Ids:
        found = [token for token, piece in enumerate(self.pieces) if piece and fits(piece)]
        return np.array(found, np.intp)

    def allowed(self, matcher: LLMatcher) -> Allowed:
        """Which tokens the grammar allows next."""
        return allowed_tokens(matcher, len(self.pieces))

    def closest(self, allowed: Allowed, inside: bool) -> int | None:
        """Of the tokens that lead to the end at once the longest; None where there are none."""
        for group in self._groups[inside]:
            if len(among := group[allowed[group]]):
                return self._longest(among)
        return None

    def onward(self, allowed: Allowed) -> int | None:
        """Some token that leads on, for want of a better one: the longest, since that is how what is certain goes by
        fastest. None where none is allowed."""
        towards = allowed.copy()
        towards[self._away] = False
        among = np.flatnonzero(towards)
        if not len(among):
            among = np.flatnonzero(allowed)
        return self._longest(among) if len(among) else None

    def search(self, matcher: LLMatcher, allowed: Allowed, inside: bool) -> list[int]:
        """A short way, character by character, to where `closest` finds one; empty where none is found. After the
        first step only letters and digits are tried."""
        nodes = [(matcher, allowed, list[int]())]
        tried = 0
        for depth in range(SEARCH_DEPTH):
            further = []
            for state, may, way in nodes:
                for token in self._alphabet(may, inside, plain=depth > 0):
                    tried += 1
                    if tried > SEARCHED:
                        return []
                    ahead = state.deep_copy()
                    if not ahead.consume_token(token):
                        continue
                    then = self.allowed(ahead)
                    if self.closest(then, inside) is not None:
                        return [*way, token]
                    further.append((ahead, then, [*way, token]))
            nodes = further
        return []

    def _alphabet(self, allowed: Allowed, inside: bool, *, plain: bool) -> list[int]:
        """The characters to try. In a string one letter, and one digit, is as good as another."""
        found: dict[object, int] = {}
        among = self._characters[inside]
        for token in among[allowed[among]]:
            character = self.pieces[token].decode()
            if character.isalnum() or not plain:
                alike = character.isalnum() and inside
                found.setdefault((character.isdigit(), character.isupper()) if alike else character, int(token))
        return list(found.values())

    def _longest(self, among: Ids) -> int:
        return int(among[self._length[among].argmax()])


def allowed_tokens(matcher: LLMatcher, count: int) -> Allowed:
    """Which of a vocabulary's `count` tokens the grammar allows next."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)


_known: WeakKeyDictionary[Model, Endings] = WeakKeyDictionary()
_making = threading.Lock()


def endings(model: Model) -> Endings:
    """Those of a model, made when first asked for (0.1 s). Thread-safe."""
    with _making:
        if model not in _known:
            _known[model] = Endings(model)
        return _known[model]


class _Way:
    """A way to the end, step by step."""

    def __init__(self, to: Endings) -> None:
        self._endings = to
        self._found: deque[int] = deque()  # by the last search

    def step(self, matcher: LLMatcher, strings: Strings) -> int | None:
        """The next token of it; None where the grammar allows none."""
        allowed, inside = self._endings.allowed(matcher), strings.inside
        if strings.escaped:
            return self._endings.onward(allowed)
        token = self._endings.closest(allowed, inside)
        if token is not None:
            self._found.clear()
            return token
        if not self._found and np.count_nonzero(allowed) > 8:  # fewer: all but certain
            self._found.extend(self._endings.search(matcher, allowed, inside))
        if self._found:
            return self._found.popleft()
        return self._endings.onward(allowed)


class WindDown:
    """One request's. `begun`: from here on the way to the end is taken."""

    def __init__(self, to: Endings) -> None:
        self._endings = to
        self._strings = Strings()
        self._way = _Way(to)
        self._look_at = WINDOW  # tokens left at which the way is looked at next
        self._patience = PATIENCE
        self.begun = False

    def choose(self, matcher: LLMatcher, left: int) -> int | None:
        """The token to take, with so many left to the limit; None: the model's own choice."""
        if matcher.is_error() or (not self.begun and (left > self._look_at or matcher.is_accepting())):
            return None
        began = time.thread_time()
        if not self.begun:
            self.begun = self._must_begin(matcher, left)
            self._patience -= time.thread_time() - began
            if self._patience < 0:
                self._look_at = -1
        return self._way.step(matcher, self._strings) if self.begun else None

    def take(self, matcher: LLMatcher, token: int) -> None:
        """This token was generated."""
        if matcher.is_accepting():
            self._strings = Strings()  # text, in which quotes mean nothing
        else:
            self._strings.take(self._endings.pieces[token])

    def _must_begin(self, matcher: LLMatcher, left: int) -> bool:
        distance = self._distance(matcher, min(left, WINDOW))
        if distance is not None and left <= distance + distance // 4 + SPARE:
            return True
        self._look_at = left - max(1, 16 if distance is None else (left - distance) // 4)
        return False

    def _distance(self, matcher: LLMatcher, most: int) -> int | None:
        """Tokens to the end from here; None for more than `most`."""
        matcher, strings, way = matcher.deep_copy(), self._strings.copy(), _Way(self._endings)
        for distance in range(most + 1):
            if matcher.is_accepting():
                return distance
            token = way.step(matcher, strings)
            if token is None or not matcher.consume_token(token):
                return None
            strings.take(self._endings.pieces[token])
        return None
