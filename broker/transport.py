"""Kombu's Redis transport, made to survive a queue entry that is no message.

Anybody who may write to a queue's list can push bytes that are not a Celery message; kombu 5.7 lets the parse error end
the worker. Here such an entry is logged and dropped, and its neighbours are delivered.
"""

from __future__ import annotations

from queue import Empty
from typing import Any

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis

log = structlog.get_logger(__name__)


class Channel(redis.Channel):
    """A channel whose reads skip foreign entries."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("foreign_message", reason=f"not a Celery message: {type(error).__name__}: {error}")
            raise Empty from None


class Transport(redis.Transport):
    """The transport `redis://`, `rediss://` and `redis+socket://` mean once `install` was called."""

    Channel = Channel


def install() -> None:
    """Make this transport the Redis transport of every kombu connection in this process."""
    for alias in ("redis", "rediss"):
        TRANSPORT_ALIASES[alias] = f"{__name__}:Transport"
