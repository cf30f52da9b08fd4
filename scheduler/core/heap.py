"""A binary heap of (key, item) pairs in two numpy arrays: 16 bytes an entry, where tuples in a list take 100."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from perllm.scheduler.core.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@compiled
def _up(keys: Floats, items: Ints, i: int) -> None:
    """Sift entry `i` up."""
    key, item = keys[i], items[i]
    while i > 0:
        parent = (i - 1) >> 1
        if keys[parent] < key or (keys[parent] == key and items[parent] <= item):
            break
        keys[i], items[i] = keys[parent], items[parent]
        i = parent
    keys[i], items[i] = key, item


@compiled
def _down(keys: Floats, items: Ints, size: int, i: int) -> None:
    """Sift entry `i` down."""
    key, item = keys[i], items[i]
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (keys[right] < keys[child] or (keys[right] == keys[child] and items[right] < items[child])):
            child = right
        if key < keys[child] or (key == keys[child] and item <= items[child]):
            break
        keys[i], items[i] = keys[child], items[child]
        i = child
    keys[i], items[i] = key, item


@compiled
def _build(keys: Floats, items: Ints, size: int) -> None:
    """Make a heap of the first `size` entries in any order."""
    for i in range(size // 2 - 1, -1, -1):
        _down(keys, items, size, i)


class Heap:
    """Smallest key first; of equal keys, smallest item."""

    __slots__ = ("_first", "_items", "_keys", "_size")

    def __init__(self) -> None:
        self._keys: Floats = np.empty(16)
        self._items: Ints = np.empty(16, np.int64)
        self._size = 0
        self._first: tuple[float, int] | None = None  # None: not looked up

    def __len__(self) -> int:
        return self._size

    def push(self, key: float, item: int) -> None:
        size = self._size
        if size == len(self._keys):
            self._resize(2 * size)
        self._keys[size], self._items[size] = key, item
        self._size = size + 1
        if self._first is not None and (key, item) < self._first:
            self._first = key, item
        _up(self._keys, self._items, size)

    def peek(self) -> tuple[float, int]:
        """The first entry. The heap must not be empty."""
        if self._first is None:
            self._first = float(self._keys[0]), int(self._items[0])
        return self._first

    def pop(self) -> tuple[float, int]:
        """Take out the first entry. The heap must not be empty."""
        keys, items, first = self._keys, self._items, self.peek()
        self._size, self._first = self._size - 1, None
        size = self._size
        if size:
            keys[0], items[0] = keys[size], items[size]
            _down(keys, items, size, 0)
        if 64 < size < len(keys) // 4:
            self._resize(len(keys) // 2)
        return first

    def entries(self) -> tuple[Floats, Ints]:
        """Views of all keys and items, in no particular order."""
        return self._keys[: self._size], self._items[: self._size]

    def replace(self, keys: Floats, items: Ints) -> None:
        """Hold exactly these entries."""
        self._keys, self._items, self._size, self._first = keys.copy(), items.copy(), len(keys), None
        if self._size < 16:
            self._resize(16)
        _build(self._keys, self._items, self._size)

    def _resize(self, capacity: int) -> None:
        keys, items, size = np.empty(capacity), np.empty(capacity, np.int64), self._size
        keys[:size], items[:size] = self._keys[:size], self._items[:size]
        self._keys, self._items = keys, items
