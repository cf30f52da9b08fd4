"""Who used the joules: a node's meter, split over the requests that were in its batch.

The meter counts a whole node. Its reading is differenced over windows (by default of 100 ms: hardware counters move
only every 20 to 100 ms), and each window is split: the node's idle power over the requests present, by the time they
were there; the rest by the work each of them did in it, in any unit proportional to cost (the engines give seconds of
their speed model, so that a prefill token and a decode token weigh what they cost). What nobody can be charged for (an
empty node's idle power, foreign work) is kept as `unattributed`. Always: Σ shares + unattributed = the meter.

A request's receipt is final the moment it leaves, yet a coarse meter may not have moved since the window began. It
then pays an advance: what its work in the open window cost at the price of recent windows, J per unit of work. When the
window closes, advances are taken off what is left to the others. And where a counter moves in ticks, a window holds one
tick too many or too few: what differs from the expected by no more than a tick is carried over to the next windows
instead of falling on whoever is there. So no receipt waits or changes, and the sum still holds exactly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

from perllm.broker.messages import Energy, Power

#: Shortest window, s, over which a reading is split.
WINDOW = 0.1
#: Exponential decay of older windows' weight in the price of work: about the last ten count.
_DECAY = 0.9
#: Work in recent windows from which the price of a unit can be told.
_LEAST_WORK = 1e-9


class Meter(Protocol):
    """A cumulative energy counter of one node."""

    #: As in `Energy`: `nvml`, `rapl`, `cpu-model`, …
    method: str
    #: False only where a hardware counter is read.
    estimated: bool
    #: Shortest span, s, over which the difference of two readings means something; 0 for any.
    resolution: float
    #: W drawn with nothing to do.
    idle: float
    #: W beyond idle while the engine works, as far as known beforehand.
    active: float

    def read(self) -> float:
        """Joules since the meter was made; never falls. Thread-safe."""


def power_of(meter: Meter, joules_per_byte: float) -> Power:
    """A metered node's power model."""
    return Power(
        idle=meter.idle,
        active=meter.active,
        joules_per_byte=joules_per_byte,
        method=meter.method,
        estimated=meter.estimated,
    )


@dataclass(slots=True)
class _Account:
    """One request's settled joules, and its part of the open window."""

    inference: float = 0.0  # J
    idle: float = 0.0  # J
    work: float = 0.0  # in the open window
    seconds: float = 0.0  # of the open window, each second shared among those present


class Attribution:
    """Splits a meter over requests. Thread-safe; every call is O(requests present).

    `enter` and `leave` bound a request's stay in the batch; `work` reports each engine step.
    """

    def __init__(self, meter: Meter, window: float = WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
        self.meter = meter
        self._window = max(window, meter.resolution)
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[Hashable, _Account] = {}
        self._worked = 0.0  # units of work in recent windows …
        self._paid = 0.0  # … and the J beyond idle they cost
        self._start = meter.read()
        self._unattributed = 0.0  # J
        self._carried = 0.0  # J metered and not charged yet; negative when charged and not metered yet
        self._open(self._start, clock())

    def _open(self, reading: float, now: float) -> None:
        self._reading, self._opened, self._seen = reading, now, now
        self._advanced = 0.0  # J paid by those who left in this window
        self._advanced_work = 0.0
        self._empty = 0.0  # s nobody was present
        for account in self._accounts.values():
            account.work = account.seconds = 0.0

    def enter(self, key: Hashable) -> None:
        """A request joins the batch. Raises ValueError for one that is there already."""
        with self._lock:
            if key in self._accounts:
                raise ValueError(f"{key!r} is in the batch already")
            now = self._clock()
            if not self._accounts and now - self._opened >= self.meter.resolution:
                self._close(now)  # an idle spell's energy is not for the newcomer
            self._pass_time(now)
            self._accounts[key] = _Account()

    def work(self, done: Mapping[Hashable, float]) -> None:
        """An engine step ended in which each request did so much work (any one unit)."""
        with self._lock:
            now = self._clock()
            for key, amount in done.items():
                self._accounts[key].work += amount
            if now - self._opened >= self._window:
                self._close(now)

    def leave(self, key: Hashable) -> Energy:
        """A request leaves; its energy is final. Raises KeyError for one that is not there."""
        with self._lock:
            now = self._clock()
            account = self._accounts[key]
            if now - self._opened >= self.meter.resolution:
                self._close(now)
            else:
                self._pass_time(now)
                self._advance(account, now)
            del self._accounts[key]
            return Energy(
                inference=account.inference,
                idle=account.idle,
                method=self.meter.method,
                estimated=self.meter.estimated,
            )

    def settle(self) -> float:
        """Close the open window and return the meter's joules since the attribution began."""
        with self._lock:
            self._close(self._clock())
            return self._reading - self._start

    @property
    def unattributed(self) -> float:
        """Joules of the closed windows that no request was charged for; negative while advances exceed them."""
        with self._lock:
            return self._unattributed + self._carried - self._advanced

    def _pass_time(self, now: float) -> None:
        passed, self._seen = now - self._seen, now
        if not self._accounts:
            self._empty += passed
        for account in self._accounts.values():
            account.seconds += passed / len(self._accounts)

    def _advance(self, account: _Account, now: float) -> None:
        if self._worked > _LEAST_WORK:
            inference = self._paid / self._worked * account.work
        else:  # nothing is known yet but the meter's word
            work = sum(a.work for a in self._accounts.values()) + self._advanced_work
            inference = self.meter.active * (now - self._opened) * account.work / work if work else 0.0
        idle = self.meter.idle * account.seconds
        account.inference += inference
        account.idle += idle
        self._advanced += inference + idle
        self._advanced_work += account.work

    def _close(self, now: float) -> None:
        self._pass_time(now)
        reading = self.meter.read()
        metered = reading - self._reading
        seconds = self._empty + sum(a.seconds for a in self._accounts.values())
        work = sum(a.work for a in self._accounts.values())
        left = metered - self._advanced + self._carried
        energy = max(0.0, left - self._tick_error(left, metered, seconds, work, now))
        self._carried = left - energy
        idle = min(energy, self.meter.idle * seconds)
        charged = 0.0
        for account in self._accounts.values():
            of_idle = idle * account.seconds / seconds if seconds else 0.0
            of_work = (energy - idle) * account.work / work if work else 0.0
            account.idle += of_idle
            account.inference += of_work
            charged += of_idle + of_work
        self._unattributed += energy - charged
        if work + self._advanced_work:
            beyond_idle = metered - self.meter.idle * (now - self._opened)
            self._worked = _DECAY * self._worked + work + self._advanced_work
            self._paid = max(0.0, _DECAY * self._paid + beyond_idle)
        self._open(reading, now)

    def _tick_error(self, left: float, metered: float, seconds: float, work: float, now: float) -> float:
        """How much of `left` is likely to be there only because the counter moves in ticks, J."""
        elapsed = now - self._opened
        if self._worked <= _LEAST_WORK or elapsed <= 0:
            return 0.0
        expected = self.meter.idle * seconds + self._paid / self._worked * work
        tick = metered / elapsed * self.meter.resolution
        return max(-tick, min(tick, left - expected))
