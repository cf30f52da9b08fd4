"""The slot price: what a second in one of a node's slots costs while work is more than the slots can take.

It is the dual variable of the node's slots, tuned online: it rises while more of them are taken than leaves room for
who comes next, and falls while fewer are. A task is worth its place when its expected value per second in the slot is
above the price, so under overload it is the density of value that decides who runs.

The price is kept without unit, in mean task values per mean stay: at 1, the average task just pays for its slot.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: Share of its slots a node should have taken while urgent work comes; without any, all of them.
TARGET = 0.8
#: Change of the price per second and share of the slots above or below the target.
GAIN = 0.08
#: No price is above this many mean task values per mean stay.
MAX_PRICE = 3.0
#: Urgent tasks in a node's slots at a time (as a share of them) from which on room is kept for the next.
URGENT_SHARE = 0.05
#: Weight of a new stay in their mean.
STAY_WEIGHT = 0.05


@dataclass(slots=True)
class SlotPrice:
    """One node's price, and the mean stay of a task in its slots (s)."""

    price: float = 0.0
    at: float = 0.0  # s
    stay: float = 0.0  # 0: none seen yet

    def watch(self, now: float, taken: float, urgent: float) -> None:
        """Until `now`, the share `taken` of the slots was taken or queued for, by urgent tasks `urgent` in the mean."""
        target = 1.0 if urgent <= 0 else 1.0 - (1.0 - TARGET) * min(1.0, urgent / URGENT_SHARE)
        # An hour without news is no hour of overload.
        since = min(max(now - self.at, 0.0), 2.0)
        self.price = min(max(self.price + GAIN * since * (taken - target), 0.0), MAX_PRICE)
        self.at = max(now, self.at)

    def stayed(self, seconds: float) -> None:
        """A task held a slot for so long."""
        self.stay = self.stay + STAY_WEIGHT * (seconds - self.stay) if self.stay > 0 else max(seconds, 1e-3)

    def per_second(self, value: float, taken: float) -> float:
        """The price of a second in a slot, where `value` is the mean task's, in units of the index.

        While the share `taken` of the slots leaves room for who comes next, they cost less: what an overload left of
        the price must not keep a task from an idle node.
        """
        return self.price * value / self.stay * min(1.0, taken / TARGET) if self.stay > 0 else 0.0

    def snapshot(self) -> dict[str, Any]:
        return asdict(self)
