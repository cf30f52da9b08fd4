"""Running the one Lua script: by its digest, loading it where the server does not have it yet.

A server at its memory limit refuses new work and nothing else: what was accepted must be able to end. So the script is
loaded twice, and only submissions run under the limit (valkey.io, "Scripting with Lua", script flags).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

Argument = str | bytes | int | float
_BODY = Path(__file__).with_name("ledger.lua").read_text(encoding="utf-8")
_BOUNDED = f"#!lua flags=allow-cross-slot-keys\n{_BODY}"
_UNBOUNDED = f"#!lua flags=allow-cross-slot-keys,allow-oom\n{_BODY}"
_DIGESTS = {
    source: hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest() for source in (_BOUNDED, _UNBOUNDED)
}


def _digest(operation: Argument) -> str:
    return _DIGESTS[_BOUNDED if operation == "submit" else _UNBOUNDED]


class Script:
    """The ledger script bound to a client and a key prefix. `tail` is appended to every call's arguments."""

    def __init__(self, client: redis.Redis, prefix: str, tail: Sequence[Argument]) -> None:
        self._client = client
        self._prefix = prefix
        self._tail = tuple(tail)

    def call(self, operation: str, *arguments: Argument) -> Any:
        """Run one operation and return its reply."""
        reply = self.pipeline([(operation, *arguments)])[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def pipeline(self, calls: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """Run many operations in one round trip, not as one transaction: each stands or fails for itself. Returns the
        replies in order; a failed call's reply is its exception."""
        if not calls:
            return []
        replies = self._send(calls)
        missing = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
        if missing:
            for source in _DIGESTS:
                self._client.script_load(source)
            for i, reply in zip(missing, self._send([calls[i] for i in missing]), strict=True):
                replies[i] = reply
        return replies

    def stream(self, pieces: Iterator[Sequence[tuple[Argument, ...]]]) -> Iterator[list[Any]]:
        """`pipeline` for many pieces on one connection: the server works on one while the next is being made. Replies
        come piece by piece; each piece's must fit the socket's buffers (some 100 kB)."""
        first = next(pieces, None)
        if first is None:
            return
        yield self.pipeline(first)  # which also sees to it that the server has the script
        pool = self._client.connection_pool
        connection = pool.get_connection()
        try:
            awaited = 0
            for piece in pieces:
                words = [("EVALSHA", _digest(call[0]), 1, self._prefix, *call, *self._tail) for call in piece]
                connection.send_packed_command(connection.pack_commands(words))  # type: ignore[no-untyped-call]
                if awaited:
                    yield [connection.read_response() for _ in range(awaited)]
                awaited = len(words)
            if awaited:
                yield [connection.read_response() for _ in range(awaited)]
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]  # replies may be outstanding
            raise
        finally:
            pool.release(connection)

    def _send(self, calls: Sequence[tuple[Argument, ...]]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        for call in calls:
            pipe.evalsha(_digest(call[0]), 1, self._prefix, *call, *self._tail)
        return pipe.execute(raise_on_error=False)
