"""The paper's constraints C1 to C4, each answering with its normalised slack: the share of what it allows that is left.

Negative means violated. C1, the deadline, is what the forecast turns into a probability; its slack here is that of the
expected finish.
"""

from __future__ import annotations

from perllm.scheduler.core.compiled import compiled


@compiled
def deadline_slack(finish: float, left: float) -> float:
    """C1: `finish` s predicted of the `left` s until the deadline."""
    return 1.0 - finish / max(left, 1e-3)


@compiled
def compute_slack(held: float, places: float) -> float:
    """C2: tasks held, this one included, of the places a node has (slots, and its queue beyond them)."""
    return 1.0 - held / max(places, 1.0)


@compiled
def memory_slack(needed: float, used: float, size: float) -> float:
    """C2: KV cache `needed` by this task and `used` by others when they are done, of its `size` (tokens)."""
    return 1.0 - (used + needed) / max(size, 1.0)


@compiled
def bandwidth_slack(size: float, coming: float, rate: float, left: float) -> float:
    """C3: `size` bytes of this task and those `coming` before it, of what the link carries (`rate` bytes/s) until the
    deadline, in `left` s."""
    return 1.0 - (size + coming) / max(rate * left, 1.0)


def single_server_slack(holders: int) -> float:
    """C4: nodes that hold the task already, of none allowed."""
    return 1.0 if holders == 0 else -float(holders)
