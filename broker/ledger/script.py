"""Running the ledger's operations: a library of two functions, loaded where the server does not have it yet.

A server at its memory limit refuses new work and nothing else: what was accepted must be able to end. So `submit` is a
function of its own, and only that one runs under the limit (valkey.io, "Scripting with Lua", script flags).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from broker.functions import Argument, Library, load_or_raise, missing

__all__ = ["LEDGER", "Argument", "Script"]

LEDGER = Library("ledger", Path(__file__).with_name("ledger.lua").read_text(encoding="utf-8"))


def _function(operation: Argument) -> str:
    return f"{LEDGER.name}_{'submit' if operation == 'submit' else 'call'}"


class Script:
    """The ledger's functions bound to a client and a key prefix. `tail` is appended to every call's arguments."""

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
        again = [i for i, reply in enumerate(replies) if missing(reply)]
        if again:
            load_or_raise(self._client, [LEDGER], replies[again[0]])
            for i, reply in zip(again, self._send([calls[i] for i in again]), strict=True):
                replies[i] = reply
        return replies

    def stream(self, pieces: Iterator[Sequence[tuple[Argument, ...]]]) -> Iterator[list[Any]]:
        """`pipeline` for many pieces on one connection: the server works on one while the next is being made. Replies
        come piece by piece; each piece's must fit the socket's buffers (some 100 kB)."""
        first = next(pieces, None)
        if first is None:
            return
        yield self.pipeline(first)  # which also sees to it that the server has the functions
        pool = self._client.connection_pool
        connection = pool.get_connection()
        try:
            awaited = 0
            for piece in pieces:
                words = [self._words(call) for call in piece]
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
            pipe.execute_command(*self._words(call))  # type: ignore[no-untyped-call]
        return pipe.execute(raise_on_error=False)

    def _words(self, call: tuple[Argument, ...]) -> tuple[Argument, ...]:
        return ("FCALL", _function(call[0]), 1, self._prefix, *call, *self._tail)
