"""The context of a distributed trace, as clients send it (w3.org/TR/trace-context, "traceparent Header")."""

from __future__ import annotations

import re

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
#: Characters of it that are known; later versions may have more.
_KNOWN = 55


def valid_traceparent(given: object) -> str | None:
    """What can be kept of it; None where it is not valid, which is no error: there is no trace then."""
    found = _TRACEPARENT.fullmatch(given) if isinstance(given, str) and len(given) <= 512 else None
    if found is None or (found[1] == "00" and found[2] is not None):
        return None
    return found[0][:_KNOWN]


def trace_id(traceparent: str) -> str:
    """The trace's name in a valid one, 32 hexadecimal digits."""
    return traceparent[3:35]
