"""A link shared equally by the transfers on it (processor sharing)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from perllm.scheduler.simulator.clock import Callback, Clock, Timer
from perllm.scheduler.simulator.speed_changes import PiecewiseConstant


@dataclass(frozen=True, slots=True, order=True)
class Transfer:
    """One payload on its way: it has arrived when the link's virtual bytes reach `until`."""

    until: float
    order: int
    done: Callback = field(compare=False)


class SharedLink:
    """Moves payloads at `seconds_per_byte`, every transfer in progress getting an equal share.

    Book-keeping is in virtual bytes: what a transfer that was always there would have received. A transfer ends when
    that has grown by its size, so a change in sharing costs O(log n) and not O(n).
    """

    def __init__(self, clock: Clock, seconds_per_byte: PiecewiseConstant) -> None:
        self._clock, self._seconds_per_byte = clock, seconds_per_byte
        self._virtual = 0.0  # bytes per transfer, as of `_seen`
        self._seen = clock.now
        self._heap: list[Transfer] = []
        self._count = 0
        self._timer: Timer | None = None

    def send(self, size: float, done: Callback) -> Transfer:
        """Start moving `size` bytes; `done` is called when the last has arrived."""
        self._catch_up()
        self._count += 1
        transfer = Transfer(self._virtual + size, self._count, done)
        heapq.heappush(self._heap, transfer)
        self._plan()
        return transfer

    def left(self, transfer: Transfer) -> float:
        """Bytes a transfer in progress has yet to receive."""
        self._catch_up()
        return max(transfer.until - self._virtual, 0.0)

    def cancel(self, transfer: Transfer) -> None:
        """Stop a transfer in progress; its `done` is never called."""
        self._catch_up()
        self._heap.remove(transfer)
        heapq.heapify(self._heap)
        self._plan()

    def halt(self) -> None:
        """The machine is gone: nothing arrives any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _catch_up(self) -> None:
        """Bring the virtual bytes up to now."""
        now, sharing = self._clock.now, len(self._heap)
        while self._seen < now:
            per_byte, until = self._seconds_per_byte.at(self._seen)
            end = min(until, now)
            if sharing:
                self._virtual += (end - self._seen) / (per_byte * sharing)
            else:
                end = now  # an idle link need not be followed step by step
            self._seen = end

    def _plan(self) -> None:
        """Set the timer to the end of the first transfer to end as things stand."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._heap:
            return
        left, sharing, time = self._heap[0].until - self._virtual, len(self._heap), self._seen
        while True:
            per_byte, until = self._seconds_per_byte.at(time)
            end = time + left * per_byte * sharing
            if end <= until:
                break
            left -= (until - time) / (per_byte * sharing)
            time = until
        self._timer = self._clock.at(end, self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        self._catch_up()
        first = heapq.heappop(self._heap)
        self._virtual = max(self._virtual, first.until)  # rounding must not leave it a hair short
        self._plan()
        first.done()
