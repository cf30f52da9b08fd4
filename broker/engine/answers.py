"""Several answers to one prompt: what engines share."""

from __future__ import annotations

#: Seeds are below this: one more, and llama.cpp draws its own.
_SEEDS = 2**32 - 1


def answer_seed(seed: int, index: int) -> int:
    """The seed by which answer `index` of a task with this seed is drawn: a task for one answer with that seed gives
    the same. vLLM counts on in the same way."""
    return (seed + index) % _SEEDS
