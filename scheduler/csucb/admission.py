"""Whether the best node for a task is good enough: place it, let it wait, or refuse it with a reason.

Waiting is worth what the task would be worth on the node that would then be best, room or no room there now, with half
of its time gone and those before it done, at what it usually costs others to be there. So a task with time left waits
for a node that is cheaper and soon enough, and for a better moment where this one is worse than most; it goes where it
can when its deadline, or the backlog, asks for it. Energy that must be paid anyway, now or later, is no reason to wait.

A task is refused only when no node could finish it in time even with nothing else to do, and that is believed of nodes
that have proven it; where one has not, the task is tried, or wrong beliefs would never be mended.
"""

from __future__ import annotations

from perllm.scheduler.core.compiled import compiled

#: Least P(on time) worth trying.
MIN_P_ON_TIME = 0.05
#: The least energy a task can cost weighs against it by at most this share of its value.
ENERGY_SHARE = 0.5
#: A task that waits is decided about again after this share of its time left, and at least so many s.
REVIEW_SHARE, MIN_REVIEW = 0.2, 0.05
#: What of its time a task that waits is to have left, and how much more time than the backlog needs to drain.
TIME_KEPT, DRAIN_MARGIN = 0.5, 2.0
#: A task that may choose its moment costs others this share of what tasks usually do.
MOMENT = 0.5
#: Waiting must be worth so much more, as a share of the task's value: it is not for nothing.
WORTH_WAITING = 0.01


@compiled
def time_after_waiting(left: float, backlog: float, throughput: float) -> float:
    """Seconds a task that has `left` s is to count on if it waits: of `backlog` tasks, the nodes can finish
    `throughput` per s."""
    drain = DRAIN_MARGIN * backlog / throughput if throughput > 0 else 0.0
    return TIME_KEPT * left - drain


@compiled
def worth_of_waiting(most: float, p_later: float, extra: float, least: float, usual: float) -> float:
    """What a task of the weighed value `most` would be worth on a node later, where it costs `extra` more energy than
    `least`, which it costs anywhere, and usually others `usual`; all in units of the index."""
    return most * p_later - extra - min(least, ENERGY_SHARE * most) - MOMENT * usual


def review(now: float, left: float) -> float:
    """When a waiting task is decided about again, s."""
    return now + max(MIN_REVIEW, REVIEW_SHARE * left)
