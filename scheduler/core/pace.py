"""How long a node takes to take up (claim) what it has a slot for, and how far it is trusted to.

The patience with it is reckoned as TCP reckons its retransmission time-out from round trips (RFC 6298, section 2). A
node that was found wanting gets work again as TCP sends again after one (RFC 5681, slow start): after a pause that
doubles each time, one task at a time, and twice as many whenever it takes one up.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds of patience before anything was seen of a node, and at least: a busy machine may pause for so long.
FIRST_PATIENCE, LEAST_PATIENCE = 5.0, 2.0
#: Longest patience, and longest pause, s.
MOST_PATIENCE, LONGEST_PAUSE = 10.0, 300.0
#: Weights of a new delay in the mean, and of its distance from that in the deviation (RFC 6298).
MEAN_WEIGHT, DEVIATION_WEIGHT = 1 / 8, 1 / 4


@dataclass(slots=True)
class Pace:
    """What was seen of one node. Times are the server's clock, s."""

    mean: float | None = None  # delay between a task having a slot and its being claimed, s
    deviation: float = 0.0
    distrust: str = ""  # why it is sent little; empty: it is trusted
    lapses: int = 0  # since it was last trusted
    rests_until: float = 0.0  # it is sent nothing before
    trial: int = 0  # tasks it may hold unclaimed then

    @property
    def patience(self) -> float:
        """Seconds it may take to claim what it has a slot for."""
        if self.mean is None:
            return FIRST_PATIENCE
        return min(max(self.mean + 4 * self.deviation, LEAST_PATIENCE), MOST_PATIENCE)

    def claimed(self, delay: float, room: int) -> None:
        """It claimed a task that had a slot for `delay` s. Trusted with `room` tasks, it is trusted altogether."""
        if self.mean is None:
            self.mean, self.deviation = delay, delay / 2
        else:
            self.deviation += DEVIATION_WEIGHT * (abs(delay - self.mean) - self.deviation)
            self.mean += MEAN_WEIGHT * (delay - self.mean)
        if self.distrust:
            self.trial *= 2
            if self.trial >= room:
                self.distrust, self.lapses = "", 0

    def lapsed(self, now: float, reason: str) -> None:
        """It took up nothing for longer than the patience with it."""
        self.distrust, self.lapses, self.trial = reason, self.lapses + 1, 1
        self.rests_until = now + min(self.patience * 2 ** (self.lapses - 1), LONGEST_PAUSE)

    def distrusted(self, reason: str) -> None:
        """Another leader distrusted it."""
        self.distrust, self.lapses, self.trial = reason, 1, 1

    def trusts(self, unclaimed: int, now: float) -> bool:
        """Whether it may be sent one more task, holding so many unclaimed."""
        return not self.distrust or (now >= self.rests_until and unclaimed < self.trial)
