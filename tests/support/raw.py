"""The server past the ledger: what tests look at there, and spoil."""

from __future__ import annotations

import redis

from perllm.broker.connection import connect
from perllm.broker.ledger import Ledger

_connections: dict[str, redis.Redis] = {}


def redis_of(ledger: Ledger) -> redis.Redis:
    """A connection of the tests' own to the server a ledger is on, as the same user."""
    url = ledger.settings.url
    if url not in _connections:
        _connections[url] = connect(ledger.settings)
    return _connections[url]


def prefix_of(ledger: Ledger) -> str:
    """What the ledger's keys begin with."""
    return f"{{{ledger.settings.cell}}}:"
