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
#: Tokens left, beside what ways and their growth were so far, from which on each token that may lengthen the way is
#: checked.
NEAR = 96
#: CPU time a request may spend on looking, s, again on finding the steps, and again on taking what is at hand: others
#: in the batch wait meanwhile.
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

    def step(self, matcher: LLMatcher, strings: Strings, *, search: bool = True) -> int | None:
        """The next token of it; None where the grammar allows none."""
        allowed, inside = self._endings.allowed(matcher), strings.inside
        if strings.escaped:
            return self._endings.onward(allowed)
        token = self._endings.closest(allowed, inside)
        if token is not None:
            self._found.clear()
            return token
        if search and not self._found and np.count_nonzero(allowed) > 8:  # fewer: all but certain
            self._found.extend(self._endings.search(matcher, allowed, inside))
        if self._found:
            return self._found.popleft()
        return self._endings.onward(allowed)


class WindDown:
    """One request's. `begun`: from here on the way to the end is taken.

    Each token may lead further from the end, an opening brace by all that its object must have. So the way is measured
    now and then while there is room, and after each such token once there is little: one from which the end could not
    be reached any more is taken back.
    """

    def __init__(self, to: Endings) -> None:
        self._endings = to
        self._strings = Strings()
        self._way = _Way(to)
        self._known = False  # whether the way was found when it was last looked for
        self._distance = 0  # tokens to the end when it was last measured
        self._furthest = 0  # most by which it has grown from one measurement to the next
        self._look_at = WINDOW  # tokens left at which it is measured next
        self._patience = PATIENCE
        self.begun = False

    def ending(self, matcher: LLMatcher, left: int) -> int | None:
        """The token to take, with so many left to the limit; None: the model's own choice."""
        if matcher.is_error() or (not self.begun and (left > self._look_at or matcher.is_accepting())):
            return None
        if not self.begun:
            self._measure(matcher, left)
        if not self.begun or self._patience < -2 * PATIENCE:
            return None
        began = time.thread_time()
        token = self._way.step(matcher, self._strings, search=self._patience > -PATIENCE)
        self._patience -= time.thread_time() - began
        return token

    def take(self, matcher: LLMatcher, token: int, left: int) -> bool:
        """The model chose this token, and the grammar has taken it; so many are left after it. Whether it may stand: if
        not, take it back, and from then on the way to the end is taken."""
        piece, before = self._endings.pieces[token], self._strings.copy()
        if matcher.is_accepting():
            self._strings = Strings()  # text, in which quotes mean nothing
            return True
        self._strings.take(piece)
        commits = b'"' in piece or (not before.inside and any(mark in piece for mark in b"{[,"))
        near = left <= NEAR + 4 * self._distance + 2 * self._furthest
        if self.begun or not (commits and near and self._known) or matcher.is_error():
            return True
        self._measure(matcher, left)
        if self._known and not self.begun:
            return True
        self._known, self.begun, self._strings = True, True, before
        return False

    def _measure(self, matcher: LLMatcher, left: int) -> None:
        began = time.thread_time()
        distance = self._measured(matcher, min(left, WINDOW), began + self._patience)
        self._patience -= time.thread_time() - began
        if distance is not None:
            self._furthest = max(self._furthest, distance - self._distance)
            self._known, self._distance = True, distance
            self._look_at = left - max(1, (left - distance) // 4)
            # Without patience rather too early than never.
            self.begun = left <= distance + distance // 4 + SPARE or self._patience <= 0
        else:
            self._known = False
            self._look_at = left - 16
            self.begun = self._patience <= 0

    def _measured(self, matcher: LLMatcher, most: int, until: float) -> int | None:
        """Tokens to the end from here; None for more than `most`, and when it is not found `until` then (s of this
        thread's CPU time)."""
        matcher, strings, way = matcher.deep_copy(), self._strings.copy(), _Way(self._endings)
        for distance in range(most + 1):
            if matcher.is_accepting():
                return distance
            token = way.step(matcher, strings) if time.thread_time() < until else None
            if token is None or not matcher.consume_token(token):
                return None
            strings.take(self._endings.pieces[token])
        return None
