"""How fast payloads reach a node: an exponentially weighted mean of the logarithm of the measured bandwidth.

A transfer costs `latency` + bytes / `rate`. Small payloads take hardly more than the round trip, so they teach the
latency; large ones teach the rate. In logarithms a burst of slow transfers and one of fast ones weigh alike.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

#: Weight of a new sample in the mean.
SAMPLE_WEIGHT = 0.3
#: Payloads of fewer bytes tell of the latency alone.
SMALL_PAYLOAD = 16_384


@dataclass(slots=True)
class Bandwidth:
    """The link to one node."""

    log_rate: float  # ln(bytes/s)
    latency: float = 0.0  # s

    @classmethod
    def prior(cls, rate: float) -> Bandwidth:
        """As registered (bytes/s), until measured."""
        return cls(math.log(rate))

    @property
    def rate(self) -> float:
        """Bytes/s."""
        return math.exp(self.log_rate)

    def learn(self, size: int, seconds: float) -> None:
        """A payload of `size` bytes took `seconds`."""
        if size < SMALL_PAYLOAD:
            self.latency += SAMPLE_WEIGHT * (max(seconds - size / self.rate, 0.0) - self.latency)
        elif seconds > 0:
            net = max(seconds - self.latency, 0.1 * seconds)
            self.log_rate += SAMPLE_WEIGHT * (math.log(size / net) - self.log_rate)

    def snapshot(self) -> dict[str, Any]:
        return asdict(self)
