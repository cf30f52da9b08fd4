"""Kombu's Redis transport, made to survive a queue entry that is no message.

Anybody who may write to a queue's list can push bytes that are not a Celery message. Kombu and Celery 5.7 let some of
them end the worker, and keep others as delivered but never acknowledged, so that each takes one of the worker's places
for good. Here such an entry is logged and dropped, and its neighbours are delivered.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty
from typing import Any

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis
from pydantic import BaseModel, ValidationError

from broker.errors import field_errors

log = structlog.get_logger(__name__)


class _Task(BaseModel):
    """What Celery takes for granted of a message: these are in its headers (protocol 2) or its body (protocol 1)."""

    task: str
    id: str
    timelimit: tuple[float | None, float | None] | None = None
    retries: int | None = None
    eta: str | None = None
    expires: str | None = None


class Channel(redis.Channel):
    """A channel whose consumers never see foreign entries twice."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _report(error)
            raise Empty from None

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], object], consumer_tag: str, **options: Any
    ) -> Any:
        def deliver(message: Any) -> object:
            try:
                if not no_ack:  # without acknowledgement it is no task but an event, or remote control
                    _Task.model_validate(message.headers if "task" in message.headers else message.payload)
                return callback(message)
            except self.connection_errors:
                raise
            except Exception as error:  # whatever it is, the message has taken a place and must give it back
                _report(error)
                if not message.acknowledged:
                    message.reject()
                return None

        return super().basic_consume(queue, no_ack, deliver, consumer_tag, **options)  # type: ignore[no-untyped-call]


def _report(error: Exception) -> None:
    reason = field_errors(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
    log.warning("foreign_message", reason=f"not a Celery message: {reason[:200]}")


class Transport(redis.Transport):
    """The transport `redis://`, `rediss://` and `redis+socket://` mean once `install` was called."""

    Channel = Channel


def install() -> None:
    """Make this transport the Redis transport of every kombu connection in this process."""
    for alias in ("redis", "rediss"):
        TRANSPORT_ALIASES[alias] = f"{__name__}:Transport"
