"""How fast payloads reach a node: an exponentially weighted mean of the logarithm of the measured bandwidth.

A transfer costs `latency` + bytes / `rate`. Large payloads teach the rate. A small one takes hardly more than the round
trip, and teaches the latency; many of different sizes also teach the rate, by how much longer the larger ones take,
once that stands out from the noise. Small ones all of one size cannot: then the rate stays what it is, which is the
optimistic guess. In logarithms a burst of slow transfers and one of fast ones weigh alike.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Self

#: Weight of a new sample in the mean.
SAMPLE_WEIGHT = 0.3
#: Payloads of fewer bytes are small.
SMALL_PAYLOAD = 16_384
#: What is kept of the earlier small transfers at each new one, and how many are needed for a slope.
KEEP, LEAST_SAMPLES = 0.97, 8.0
#: Standard errors a slope must be above 0, and the part of the mean time that it must explain of a typical difference.
SURE_SIGMAS, LEAST_SHARE = 4.0, 0.25


@dataclass(slots=True)
class SmallTransfers:
    """Bytes and seconds of small transfers: decayed count, means, and sums of squared deviations."""

    count: float = 0.0
    size: float = 0.0
    seconds: float = 0.0
    sizes: float = 0.0  # Σ (size − mean)²
    times: float = 0.0
    both: float = 0.0

    def add(self, size: int, seconds: float) -> None:
        """One more."""
        self.count = KEEP * self.count + 1.0
        by_size, by_time = size - self.size, seconds - self.seconds
        self.size += by_size / self.count
        self.seconds += by_time / self.count
        self.sizes = KEEP * self.sizes + by_size * (size - self.size)
        self.times = KEEP * self.times + by_time * (seconds - self.seconds)
        self.both = KEEP * self.both + by_size * (seconds - self.seconds)

    def seconds_per_byte(self) -> float | None:
        """The slope of time over size, None where it may be chance."""
        if self.count < LEAST_SAMPLES or self.sizes <= 0 or self.both <= 0:
            return None
        slope = self.both / self.sizes
        left = max(self.times - slope * self.both, 0.0)
        error = math.sqrt(left / (self.count - 2) / self.sizes)
        spread = math.sqrt(self.sizes / self.count)
        return slope if slope > SURE_SIGMAS * error and slope * spread > LEAST_SHARE * self.seconds else None


@dataclass(slots=True)
class Bandwidth:
    """The link to one node."""

    log_rate: float  # ln(bytes/s)
    latency: float = 0.0  # s
    small: SmallTransfers = field(default_factory=SmallTransfers)

    @classmethod
    def prior(cls, rate: float) -> Self:
        """As registered (bytes/s), until measured."""
        return cls(math.log(rate))

    @property
    def rate(self) -> float:
        """Bytes/s."""
        return math.exp(self.log_rate)

    def learn(self, size: int, seconds: float) -> None:
        """A payload of `size` bytes took `seconds`."""
        if size < SMALL_PAYLOAD:
            self.small.add(size, seconds)
            slope = self.small.seconds_per_byte()
            if slope is not None:
                self.log_rate += SAMPLE_WEIGHT * (-math.log(slope) - self.log_rate)
            self.latency += SAMPLE_WEIGHT * (max(seconds - size / self.rate, 0.0) - self.latency)
        elif seconds > 0:
            net = max(seconds - self.latency, 0.1 * seconds)
            self.log_rate += SAMPLE_WEIGHT * (math.log(size / net) - self.log_rate)

    def snapshot(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Self:
        """From what `snapshot` returned, of a release before small transfers were kept, too."""
        return cls(state["log_rate"], state["latency"], SmallTransfers(**state.get("small", {})))
