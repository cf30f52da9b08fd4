"""Which waiting request vLLM takes first."""

from __future__ import annotations

from perllm.broker.messages import MAX_DEADLINE


def priority(now: float, remaining: float | None, value: float, work: float) -> int:
    """vLLM's priority (least first) of a task that came at `now` (s, monotonic) with `remaining` s to its deadline,
    needs about `work` s of decoding, and has a value.

    The latest moment to begin, in ms; the slack until then counts for less the more the task is worth. Without a
    deadline it is that of the longest accepted one.
    """
    slack = (MAX_DEADLINE if remaining is None else remaining) - work
    return int(1e3 * (now + max(0.0, slack) / value))
