"""Whether the best node for a task is good enough: place it, let it wait, or refuse it with a reason.

Waiting is worth what the task would be worth on the node that would then be best, room or no room there now, with half
of its time gone and those before it done, at what it usually costs others to be there. So a task with time left waits
for a node that is cheaper and soon enough, and for a better moment where this one is worse than most; it goes where it
can when its deadline, or the backlog, asks for it.

A task is refused only when no node could finish it in time even with nothing else to do, and that is believed of nodes
that have proven it; where one has not, the task is tried, or wrong beliefs would never be mended.
"""

from __future__ import annotations

from perllm.scheduler.core.compiled import compiled

#: Least P(on time) worth trying.
MIN_P_ON_TIME = 0.05
#: The least energy a task can cost weighs against it by at most this share of its value; and so does what it costs
#: where it would go, when nothing is to be won by waiting.
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
def counted_energy(least: float, most: float) -> float:
    """The share of its energy that counts for a task which costs `least` at least and has the weighed value `most`, in
    units of the index: a long task is not put off for being long."""
    return min(1.0, ENERGY_SHARE * most / least) if least > 0.0 else 1.0


@compiled
def worth_of_waiting(gained: float, energy: float, usual: float) -> float:
    """What a task would be worth on a node later, where it has the value `gained` and costs so much `energy`, and
    others what is `usual`; all in units of the index."""
    return gained - energy - MOMENT * usual


@compiled
def worth_now(gained: float, energy: float, waiting: float, most: float) -> float:
    """What placing a task of the weighed value `most` now is worth, where it has `gained`, less what others lose, and
    costs so much `energy`; below 0, it had better wait, which is worth `waiting`."""
    if waiting <= 0.0:
        return gained - min(energy, ENERGY_SHARE * most)
    return gained - energy - waiting + WORTH_WAITING * most


def review(now: float, left: float) -> float:
    """When a waiting task is decided about again, s."""
    return now + max(MIN_REVIEW, REVIEW_SHARE * left)
