"""Whether a webhook's receiver can be relied on: a circuit breaker per webhook. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

#: Failures in a row that open the circuit.
MAX_FAILURES = 5
#: Seconds from which on an attempt is slow, and how many failures a slow one counts as: it takes others' time.
SLOW_ATTEMPT, SLOW_WEIGHT = 3.0, 3
#: Seconds of the first pause, each further one being twice as long, and of the longest.
FIRST_PAUSE, MAX_PAUSE = 15.0, 600.0
#: Seconds without one success after which a webhook is disabled.
DISABLE_AFTER = 3 * 86_400.0

State = Literal["closed", "open", "half-open", "disabled"]


class Health(BaseModel):
    """What is known of a receiver. Times in s since the epoch.

    `closed`: deliveries go out. `open`: none does before `until`. `half-open`: one goes out, as a probe; its success
    closes the circuit, its failure opens it again for twice as long. `disabled`: none goes out, and no further is made,
    until the webhook is enabled again.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    failures: int = 0  # in a row, as they count
    since: float | None = None  # the first of them
    pauses: int = 0  # in a row
    until: float = 0.0
    reason: str | None = None
    disabled: bool = False

    def state(self, now: float) -> State:
        if self.disabled:
            return "disabled"
        if not self.pauses:
            return "closed"
        return "open" if now < self.until else "half-open"

    def after(self, error: str | None, took: float, now: float) -> Health:
        """What is known after an attempt that took so long, s, and ended with this error (None: a success)."""
        if error is None:
            return Health()
        if self.state(now) in ("open", "disabled"):  # begun before that was known
            return self
        failures = min(MAX_FAILURES, self.failures + (SLOW_WEIGHT if took >= SLOW_ATTEMPT else 1))
        since = now if self.since is None else self.since
        updated = self.model_copy(update={"failures": failures, "since": since, "reason": error})
        if failures < MAX_FAILURES:
            return updated
        if now - since >= DISABLE_AFTER:
            days = int((now - since) / 86_400)
            return updated.model_copy(
                update={"disabled": True, "reason": f"nothing delivered for {days} days: {error}"}
            )
        pause = min(MAX_PAUSE, FIRST_PAUSE * 2.0**self.pauses)
        return updated.model_copy(update={"pauses": min(self.pauses + 1, 10), "until": now + pause})
