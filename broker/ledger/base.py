"""The connection and the calls that every role's part of the ledger is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from perllm.broker.connection import REPLY_TIMEOUT, connect, of_a_record, reaching
from perllm.broker.ledger.script import Argument, Call, Script, call

if TYPE_CHECKING:  # loaded when settings are read: half of what importing a client would take
    from perllm.broker.settings import Settings


class LedgerBase:
    """A connection, the ledger's functions on it, and the prefix of its keys: all its own."""

    def __init__(self, settings: Settings, *, reply_timeout: float = REPLY_TIMEOUT, retries: int = 5) -> None:
        self.settings = settings
        self._prefix = f"{{{settings.cell}}}:"
        self._client = connect(settings, reply_timeout=reply_timeout, retries=retries)
        self._script = Script(
            self._client,
            self._prefix,
            stream_length=settings.stream_length,
            retention=settings.retention,
            replicas=settings.replicas,
        )

    def _call(self, operation: str, each: Sequence[Argument] = (), /, **arguments: Argument) -> Any:
        with reaching(self.settings):
            return self._script.run(call(operation, each, **arguments))

    def _pipeline(self, calls: Sequence[Call]) -> list[Any]:
        with reaching(self.settings):
            replies = self._script.pipeline(calls)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def readable(replies: list[Any]) -> Iterator[Any]:
    """Replies one by one, None for a thing of another kind than it is to be; a failure that is not the thing's is
    raised."""
    for reply in replies:
        if isinstance(reply, Exception) and not of_a_record(reply):
            raise reply
        yield None if isinstance(reply, Exception) else reply
