"""Running the ledger's operations: a library of two functions, loaded where the server does not have it yet.

A server at its memory limit refuses new work and nothing else: what was accepted must be able to end. So `submit` is a
function of its own, and only that one runs under the limit (valkey.io, "Scripting with Lua", script flags).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import redis

from perllm.broker.errors import Unreachable
from perllm.broker.functions import Argument, Library, load_or_raise, missing

__all__ = ["LEDGER", "OPERATIONS", "Argument", "Call", "Script", "call"]

_LUA = Path(__file__).with_name("ledger.lua").read_text(encoding="utf-8")
LEDGER = Library("ledger", _LUA)


#: Seconds replicas are waited for, where a submission must be on some.
REPLICA_TIME = 1.0


class Operation(NamedTuple):
    """The names of an operation's arguments in order, and of those that follow for `each` thing it is about."""

    arguments: tuple[str, ...]
    each: tuple[str, ...]


def _operations() -> dict[str, Operation]:
    head = re.compile(r"^(?:function ops\.(\w+)|ops\['(\w+)'\] = function)\((.*?)\)(?: -- each: (.*))?", re.MULTILINE)
    found = (match.groups(default="") for match in head.finditer(_LUA))
    return {plain or quoted: Operation(_names(given), _names(each)) for plain, quoted, given, each in found}


def _names(listed: str) -> tuple[str, ...]:
    return tuple(listed.split(", ")) if listed else ()


#: As their functions in `ledger.lua` name their parameters.
OPERATIONS = _operations()

#: An operation and its arguments, in order.
Call = tuple[Argument, ...]


def call(name: str, each: Sequence[Argument] = (), /, **arguments: Argument) -> Call:
    """An operation with these arguments, and in one row those of each thing it is about. Raises TypeError where they
    are not those that `ledger.lua` names."""
    operation = OPERATIONS[name]
    whole = not each or (operation.each and len(each) % len(operation.each) == 0)
    if len(arguments) != len(operation.arguments) or not whole:
        raise TypeError(f"{name} takes {operation}, not {(*arguments,)} and {len(each)} more")
    try:
        return (name, *[arguments[argument] for argument in operation.arguments], *each)
    except KeyError as error:
        raise TypeError(f"{name} lacks {error}") from None


def _function(operation: Argument) -> str:
    return f"{LEDGER.name}_{'submit' if operation == 'submit' else 'call'}"


class Script:
    """The ledger's functions bound to a client, a key prefix, and the limits that are part of every call: the streams'
    length, and s for which what has ended is kept."""

    def __init__(
        self, client: redis.Redis, prefix: str, *, stream_length: int, retention: float, replicas: int = 0
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._limits = (stream_length, retention)
        self._replicas = replicas

    def run(self, one: Call) -> Any:
        """Run one operation and return its reply."""
        reply = self.pipeline([one])[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def pipeline(self, calls: Sequence[Call]) -> list[Any]:
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

    def stream(self, pieces: Iterator[Sequence[Call]]) -> Iterator[list[Any]]:
        """`pipeline` for many pieces on one connection: the server works on one while the next is being made. Replies
        come piece by piece; each piece's must fit the socket's buffers (some 100 kB)."""
        first = next(pieces, None)
        if first is None:
            return
        yield self.pipeline(first)  # which also sees to it that the server has the functions
        pool = self._client.connection_pool
        connection = pool.get_connection()
        try:
            awaited: tuple[int, bool] | None = None
            for piece in pieces:
                words, waits = [*map(self._words, piece)], self._waits(piece)
                connection.send_packed_command(connection.pack_commands([*words, *waits]))  # type: ignore[no-untyped-call]
                if awaited:
                    yield self._read(connection, *awaited)
                awaited = len(words), bool(waits)
            if awaited:
                yield self._read(connection, *awaited)
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]  # replies may be outstanding
            raise
        finally:
            pool.release(connection)

    def _send(self, calls: Sequence[Call]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        waits = self._waits(calls)
        for words in (*map(self._words, calls), *waits):
            pipe.execute_command(*words)  # type: ignore[no-untyped-call]
        replies = pipe.execute(raise_on_error=False)
        return self._checked(replies) if waits else replies

    def _read(self, connection: Any, count: int, waits: bool) -> list[Any]:
        replies = [connection.read_response() for _ in range(count + waits)]
        return self._checked(replies) if waits else replies

    def _waits(self, calls: Sequence[Call]) -> list[tuple[Argument, ...]]:
        """What asks, after submissions, how many replicas have them (redis.io, "WAIT")."""
        submits = self._replicas and any(operation == "submit" for operation, *_ in calls)
        return [("WAIT", self._replicas, round(1000 * REPLICA_TIME))] if submits else []

    def _checked(self, replies: list[Any]) -> list[Any]:
        """The replies before that to WAIT. Raises Unreachable where too few replicas have what was submitted."""
        *others, replicas = replies
        if isinstance(replicas, Exception):
            raise replicas
        if replicas < self._replicas:
            raise Unreachable(
                f"stored, but on {replicas} of the {self._replicas} replicas that PERLLM_REPLICAS asks for, and so not "
                "accepted: submit it again under the same id or idempotency key once they follow the server"
            )
        return others

    def _words(self, one: Call) -> tuple[Argument, ...]:
        operation, *arguments = one
        return ("FCALL", _function(operation), 1, self._prefix, operation, *self._limits, *arguments)
