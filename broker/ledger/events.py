"""The event stream as it is read: places in it, and its entries in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from pydantic import ValidationError

from perllm.broker.ledger.records import WITHDRAWN
from perllm.broker.logs import LazyLogger
from perllm.broker.messages import Ended, Event, Submitted, parse_event

#: A stream's beginning.
START = "0-0"

log = LazyLogger(__name__)


class Mark(NamedTuple):
    """A place in the event stream: the last entries read of the two it is kept in, see `ledger.lua`."""

    events: str = START
    requests: str = START

    @classmethod
    def of(cls, position: str) -> Self:
        """From its text; that of an older version knows one stream only."""
        events, _, requests = position.partition(",")
        return cls(events, requests or START)

    def __str__(self) -> str:
        return f"{self.events},{self.requests}"


def later(a: str, b: str) -> bool:
    """Whether there is anything up to position `a` that is after `b`."""
    return any(_number(x) > _number(y) for x, y in zip(Mark.of(a), Mark.of(b), strict=True))


def gap(position: str, oldest: str) -> bool:
    """Whether events that followed a position may be gone, the oldest kept being at `oldest`."""
    places = zip(Mark.of(position), Mark.of(oldest), strict=True)
    return any(at != START and _number(at) < _number(first) for at, first in places)


def _number(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence or 0)


def in_order(reply: list[Any], count: int) -> Iterator[tuple[str, str, dict[bytes, bytes]]]:
    """What was read of both streams as one: stream, position, fields. Of one millisecond, what producers caused comes
    first. Beyond the end of what was read of one stream, which may go on, nothing is taken of the other."""
    read = {name.decode().rpartition(":")[2]: entries for name, entries in reply}
    ends = [_number(entries[-1][0].decode())[0] for entries in read.values() if len(entries) == count]
    horizon = min(ends, default=None)
    merged = [
        (*_number(position.decode()), stream, position.decode(), fields)
        for stream, entries in read.items()
        for position, fields in entries
    ]
    for milliseconds, _, stream, position, fields in sorted(merged, key=lambda e: (e[0], e[2] != "requests", e[1])):
        if horizon is None or milliseconds <= horizon:
            yield stream, position, fields


def event_of(stream: str, position: str, fields: dict[bytes, bytes]) -> Event | None:
    """An entry's event. Whoever may submit may write to the stream `requests`: no more is believed there."""
    try:
        event = parse_event(fields[b"e"])
    except (ValidationError, KeyError):
        log.warning("event_unreadable", position=position)
        return None
    if stream == "requests" and not (
        isinstance(event, Submitted) or (isinstance(event, Ended) and event.state in WITHDRAWN)
    ):
        log.warning("event_forged", position=position, kind=event.type)
        return None
    return event
