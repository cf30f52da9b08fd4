"""Prompts kept in the KV cache after their request ended, so that the next one with the same prefix shares it."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from perllm.edge_worker.kv_cells import KVCells
from perllm.edge_worker.llama import Context

#: Prefixes shorter than this many tokens are not worth sharing.
SHORTEST = 16
#: Part of the KV cache that cached prompts alone may take.
SHARE_OF_CACHE = 0.25


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two lists."""
    most = min(len(a), len(b))
    # The first length at which the prefixes differ, by bisection: comparing slices runs in C.
    return bisect_left(range(1, most + 1), True, key=lambda length: a[:length] != b[:length])


class PrefixCache:
    """Cached prompts, one sequence of the context each, the least recently used evicted first."""

    def __init__(self, sequences: Sequence[int], context: Context, cells: KVCells) -> None:
        self._unused = list(sequences)
        self._context, self._cells = context, cells
        self._prompts: OrderedDict[int, list[int]] = OrderedDict()  # sequence → tokens, oldest use first
        self._most_reusable = int(context.kv_tokens * SHARE_OF_CACHE)

    def longest_match(self, tokens: Sequence[int]) -> tuple[int, int]:
        """(sequence, length) of the cached prompt with the longest common prefix; (−1, 0) without one."""
        length, sequence = max(((common_prefix(t, tokens), s) for s, t in self._prompts.items()), default=(0, -1))
        return (sequence, length) if length else (-1, 0)

    def touch(self, sequence: int) -> None:
        """A cached prompt was used."""
        self._prompts.move_to_end(sequence)

    def insert(self, sequence: int, prompt: list[int]) -> None:
        """Keep the prompt `sequence` holds, unless one kept already begins with it."""
        if len(prompt) < SHORTEST or not (self._unused or self._prompts):
            return
        kept, length = self.longest_match(prompt)
        if length == len(prompt):
            self.touch(kept)
            return
        if kept >= 0 and length == len(self._prompts[kept]):
            self.evict(kept)  # the new one holds all of it
        if not self._unused:
            self.evict(next(iter(self._prompts)))
        target = self._unused.pop()
        self._context.copy(sequence, target, len(prompt))
        self._cells.share(sequence, target, len(prompt))
        self._prompts[target] = prompt

    def trim(self) -> None:
        """Keep to the share of the KV cache that cached prompts may take."""
        while self._cells.reusable > self._most_reusable and self.evict_oldest():
            pass

    def evict_oldest(self) -> bool:
        """Evict the least recently used prompt. False when there is none."""
        if not self._prompts:
            return False
        self.evict(next(iter(self._prompts)))
        return True

    def evict(self, sequence: int) -> None:
        del self._prompts[sequence]
        self._context.remove(sequence)
        self._cells.drop(sequence)
        self._unused.append(sequence)
