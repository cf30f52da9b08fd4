"""Which webhooks may be delivered to now. Pure.

A delivery lease lets a worker post, for a few seconds, what is due to one webhook. A webhook has one lease at a time,
and a lease ends by itself: so nothing is posted twice while it is on its way, a lost message costs a minute, and
waiting hours for the next attempt costs nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

#: Leases at once in the whole cell.
MAX_LEASES = 32
#: Seconds after which a lease has ended, whatever became of the worker, and those of them in which the worker begins
#: attempts.
LEASE_TIME, WORK_TIME = 60.0, 5.0


class DeliveryLease(NamedTuple):
    """`until`, s since the epoch, tells it from every other lease."""

    webhook: str
    tenant: str
    until: float


def share(due: Iterable[tuple[str, str]], leased: Collection[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """Which of the webhooks (id and tenant) that are due get a lease, beside the `leased` ones, up to `limit` in all.

    The tenant with the fewest leases comes first, and of its webhooks the one that has waited longest. None gets more
    than a quarter of what is still free, or one: so however many receivers of however many tenants hang, there is a
    lease left for others.
    """
    leases = Counter(tenant for _, tenant in leased)
    waiting: dict[str, deque[str]] = {}
    for webhook, tenant in due:
        if (webhook, tenant) not in leased:
            waiting.setdefault(tenant, deque()).append(webhook)
    chosen: list[tuple[str, str]] = []
    while waiting and (free := limit - len(leased) - len(chosen)) > 0:
        tenant = min(waiting, key=lambda t: leases[t])
        if leases[tenant] >= max(1, free // 4):
            break
        chosen.append((waiting[tenant].popleft(), tenant))
        leases[tenant] += 1
        if not waiting[tenant]:
            del waiting[tenant]
    return chosen
