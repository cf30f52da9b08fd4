"""The API's own part of the Redis server: the keys that begin with `{<cell>}:api:`.

Tasks and nodes are the ledger's; nothing here reads or writes those.
"""

from __future__ import annotations

from perllm.broker.connection import NEAR_REPLY_TIMEOUT, connect, reaching
from perllm.broker.settings import Settings


class ApiStore:
    """One connection pool and one key prefix, shared by all stores of a process. Thread-safe.

    Calls on `client` are made inside `reaching(settings)`, which turns a connection's failures into Unreachable. Raises
    BadSetting."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = connect(settings, reply_timeout=NEAR_REPLY_TIMEOUT)
        self._prefix = f"{{{settings.cell}}}:api:"

    def key(self, *parts: str) -> str:
        """The whole name of a key: `key("rate", id)` is `{<cell>}:api:rate:<id>`."""
        return self._prefix + ":".join(parts)

    def now(self) -> float:
        """The server's clock, s since the epoch."""
        with reaching(self.settings):
            seconds, micros = self.client.time()
        return seconds + micros / 1e6

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
