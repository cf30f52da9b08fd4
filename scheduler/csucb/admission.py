"""Whether the best node for a task is good enough: place it, let it wait, or refuse it with a reason.

A task that has time gains little by running now rather than later, so only the part of its value that waiting puts at
risk (its urgency) stands against what it costs others and against energy it could save by waiting. That keeps work
with long deadlines in the pool until capacity is cheap, and lets it out when its deadline, or the backlog, asks for it.

A task is refused only when no node could finish it in time even with nothing else to do, and that is believed of nodes
that have proven it; where one has not, the task is tried, or wrong beliefs would never be mended.
"""

from __future__ import annotations

#: Least P(on time) worth trying.
MIN_P_ON_TIME = 0.05
#: Energy can weigh against a task by at most this share of its value.
ENERGY_SHARE = 0.5
#: A task that waits is decided about again after this share of its time left, and at least so many s.
REVIEW_SHARE, MIN_REVIEW = 0.2, 0.05
#: How much more time than the backlog needs to drain leaves a task its patience.
DRAIN_MARGIN = 2.0


def urgency(left: float, ample: float, backlog: float, throughput: float) -> float:
    """The share (0, 1] of a task's value that waiting puts at risk.

    It has `left` s to its deadline, and `ample` s would be more than it needs by far; `backlog` tasks wait, of which
    the cluster can finish `throughput` per s.
    """
    drain = DRAIN_MARGIN * backlog / throughput if throughput > 0 else 0.0
    return min(1.0, (ample + drain) / max(left, 1e-9))


def worth(own: float, lost: float, slot_cost: float, energy: float, least: float, urgency: float, most: float) -> float:
    """What placing a task now is worth; below 0, it had better wait.

    `own` is V times the value put at risk by waiting, `lost` V times what others lose, `slot_cost` the price of its
    time in a slot, `most` V times its value. `energy` is what it costs here and `least` where it costs least, in units
    of E₀: unless waiting loses the task, that much must be paid anyway. Each weighs at most `ENERGY_SHARE` of `most`,
    so that a long task is not put off for being long.
    """
    bound = ENERGY_SHARE * most
    return own - lost - slot_cost - (min(energy, bound) - (1.0 - urgency) * min(least, bound))


def review(now: float, left: float) -> float:
    """When a waiting task is decided about again, s."""
    return now + max(MIN_REVIEW, REVIEW_SHARE * left)
