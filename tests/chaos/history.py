"""What a run leaves behind for the checker: what producers were told, what the stream showed, what the ledger holds.

Times are the machine's clock (s since the epoch), which the server on the same machine shares.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

#: What a server that ends by force may have forgotten: nothing; its last second; or what its replica had not yet, but
#: no task that was accepted.
Fsync = Literal["always", "everysec", "replica"]


class Told(NamedTuple):
    """A producer was told that its task was accepted: it asked at `begun` and knew at `at`."""

    id: str
    key: str  # the idempotency key it was submitted under, also the beginning of its prompt
    begun: float
    at: float


class Saw(NamedTuple):
    """A producer saw a result: it asked at `begun` and knew at `at`."""

    id: str
    digest: str
    begun: float
    at: float


class Seen(NamedTuple):
    """One event, as the stream showed it: the fields the checker looks at."""

    position: str
    at: float
    type: str
    id: str = ""  # of the task
    node: str = ""
    attempt: int = 0
    state: str = ""
    cause: str = ""
    strikes: int = 0
    key: str = ""  # of a submitted task, from its preview
    reason: str = ""
    window: float = 0.0  # s a submitted task was given
    model: str = ""  # of a completed one, from its receipt


class Outage(NamedTuple):
    """The server ended by force."""

    at: float
    fsync: Fsync


class Row(NamedTuple):
    """A task as the ledger holds it."""

    state: str
    attempt: int
    strikes: int
    result: str | None  # digest of the result as stored
    result_state: str | None = None
    result_attempt: int | None = None  # of the receipt, where there is one
    stored: int = 0  # bytes of payload, features, and twice the result: Celery has a copy
    withdrawn: bool = False  # ended by a producer or at its deadline with no scheduler: it has no result of its own


@dataclass
class Dump:
    """The ledger after everything has stopped."""

    tasks: dict[str, Row] = field(default_factory=dict)
    sets: dict[str, set[str]] = field(default_factory=dict)  # state → ids
    tenants: dict[str, set[str]] = field(default_factory=dict)  # tenant → ids
    totals: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)  # tenant → bytes that the ledger counts as held for it
    celery_results: set[str] = field(default_factory=set)  # ids that Celery's backend has a result for
    other_keys: set[str] = field(default_factory=set)  # every key that is none of the above


@dataclass
class History:
    """Everything the checker needs."""

    tried: set[str]  # keys producers have submitted under, accepted or not
    told: list[Told]
    saw: list[Saw]
    events: list[Seen]  # in stream order
    undone: set[str]  # positions of events that a server which ended by force no longer had when it came back
    outages: list[Outage]
    dump: Dump
    max_strikes: int
    retained: int  # most tasks kept of each final state
