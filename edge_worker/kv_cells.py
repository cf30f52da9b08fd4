"""Which KV cells are taken: llama.cpp does not report it, so they are counted here.

A cell holds one token's keys and values; sequences that share a prefix share its cells.
"""

from __future__ import annotations


class KVCells:
    """Counts the cells of one context exactly. Sequences are numbered as in the context; those from `live` on
    only cache prompts, so cells that none but they use can be freed at any time."""

    def __init__(self, size: int, live: int) -> None:
        self._free = list(range(size))
        self._live_sequences = live
        self._users = [0] * size  # sequences using each cell
        self._live = [0] * size  # those of them below `live`
        self._held: dict[int, list[int]] = {}
        self.reusable = 0  # cells that only cached prompts use

    @property
    def free(self) -> int:
        """Cells nobody uses."""
        return len(self._free)

    def length(self, sequence: int) -> int:
        """Tokens a sequence holds."""
        return len(self._held.get(sequence, ()))

    def grow(self, sequence: int, count: int) -> None:
        """A sequence takes `count` more cells. Raises IndexError when there are not so many."""
        if count > len(self._free):
            raise IndexError(f"{count} cells wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        self._held.setdefault(sequence, []).extend(taken)
        for cell in taken:
            self._use(sequence, cell)

    def correct(self, free: int) -> None:
        """No more than so many cells are free after all: llama.cpp said so."""
        del self._free[free:]

    def share(self, source: int, target: int, count: int) -> None:
        """`target`, empty until now, takes part in the first `count` cells of `source`."""
        assert not self._held.get(target), "only an empty sequence can take over a prefix"
        shared = self._held[source][:count]
        self._held[target] = shared
        for cell in shared:
            self._use(target, cell)

    def drop(self, sequence: int) -> None:
        """A sequence gives up its cells; those no other uses become free."""
        live = sequence < self._live_sequences
        for cell in self._held.pop(sequence, ()):
            self._users[cell] -= 1
            self._live[cell] -= live
            if not self._users[cell]:
                self._free.append(cell)
                self.reusable -= not live
            elif live and not self._live[cell]:
                self.reusable += 1

    def _use(self, sequence: int, cell: int) -> None:
        live = sequence < self._live_sequences
        if live and self._users[cell] and not self._live[cell]:
            self.reusable -= 1
        elif not live and not self._users[cell]:
            self.reusable += 1
        self._users[cell] += 1
        self._live[cell] += live
