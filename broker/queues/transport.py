"""Kombu's Redis transport, made to survive a queue entry that is no message, and to lose none.

Anybody who may write to a queue's list can push bytes that are not a Celery message. Kombu and Celery 5.7 let some of
them end the worker, and keep others as delivered but never acknowledged, so that each takes one of the worker's places
for good. Here such an entry is logged and dropped, and its neighbours are delivered.

Kombu takes a message off its queue in one step (BRPOP) and notes in another that it has it; who is killed between loses
it, and a busy worker nearly always has one waiting in its socket. From a queue that is `kept` it is moved in one step
to a list of its taker's, and off that when it is noted. What a taker leaves there that is gone goes back.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from typing import Any, Literal

import structlog
from kombu.asynchronous import get_event_loop
from kombu.transport import TRANSPORT_ALIASES, redis, virtual
from kombu.utils.json import dumps, loads
from pydantic import BaseModel, ValidationError
from redis.exceptions import OutOfMemoryError, ResponseError

from perllm.broker.errors import field_errors
from perllm.broker.functions import Function
from perllm.broker.sentinels import PORT, SCHEME

log = structlog.get_logger(__name__)


class _Task(BaseModel):
    """What Celery takes for granted of a message: these are in its headers (protocol 2) or its body (protocol 1)."""

    task: str
    id: str
    timelimit: tuple[float | None, float | None] | None = None
    retries: int | None = None
    eta: str | None = None
    expires: str | None = None


class _Reply(BaseModel):
    """Where the sender of a command may have its answer: not wherever the worker that answers may write."""

    exchange: Literal["reply.celery.pidbox"]


class _Command(BaseModel):
    """Remote control, as far as we look at it."""

    reply_to: _Reply | None = None


#: What kombu's QoS notes of a message it has taken, also at the memory limit: the message was in memory before.
_NOTE = Function(
    "note",
    """
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('LREM', KEYS[3], 1, ARGV[4])
""",
    full=True,
)
#: What reading a message raises that is none: an ArithmeticError where it holds what is no decimal.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError)
#: Seconds between looks at what other workers took and have not acknowledged, whoever looks.
_RESTORE_EVERY = 5
_RESTORE_MOST = 1000
#: Seconds between looks at the lists of lower priorities while a kept queue is empty.
_LOOK_EVERY = 0.2


class _QoS(redis.QoS):
    """Survives a server that has handed a message out and is too full to let it be noted, or cannot write its disk:
    kombu would end the worker, and the message with it."""

    def append(self, message: Any, delivery_tag: str) -> None:
        with suppress(ResponseError):  # then it is in this process's memory only, or still its taker's
            self._note(message, delivery_tag)
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def _note(self, message: Any, tag: str) -> None:
        place = message.delivery_info
        noted = dumps([message._raw, place["exchange"], place["routing_key"]])  # type: ignore[no-untyped-call]
        with self.channel.conn_or_acquire() as client:
            keys = [self.unacked_index_key, self.unacked_key, self.channel.taken_key]
            _NOTE.on(client)(keys, [tag, time.time(), noted, self.channel.taken])

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Kombu's, whose lock takes a script to give back, as no role may run one. This one lapses; and who takes
        nothing that is acknowledged, as Flower, has nothing to look for."""
        if not self.channel.acknowledges:
            return
        with self.channel.conn_or_acquire() as client:
            self.channel.say_alive(client)
            if not client.set(self.unacked_mutex_key, "taken", nx=True, ex=_RESTORE_EVERY):
                return
            ended = time.time() - self.visibility_timeout
            self.channel.restore_taken(client, ended)
            for tag in client.zrange(self.unacked_index_key, 0, ended, byscore=True, offset=0, num=_RESTORE_MOST):
                self.restore_by_tag(tag, client)  # type: ignore[no-untyped-call]


class Channel(redis.Channel):
    """A channel whose consumers never see foreign entries twice, and that a full server does not end."""

    QoS: type[redis.QoS] = _QoS
    from_transport_options: tuple[str, ...] = (*redis.Channel.from_transport_options, "kept_queue")  # type: ignore[assignment]
    acknowledges = False  # whether any channel of this process consumes what is to be acknowledged
    kept_queue: str | None = None  # no message of this one is lost; it must be the only one consumed here
    taken: Any = b""  # the message that was moved last, as it rested there
    _turn = 0  # which of the queue's lists, one per priority, is looked at next; beyond them: wait for the first
    _full = False  # the server was, when a message was to be moved
    _taking = False
    _taking_key = ""
    _client: Any = None
    _in_poll: Any = False
    _brpop_sent_at: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for all that is published: kombu builds one per message, which costs more than the message."""
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        if self._client is None:
            self._client = super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        return self._client

    def _brpop_start(self, timeout: float | None = None) -> None:
        # One command waits for one list only, so the others are looked at in between
        if list(self.active_queues) != [self.kept_queue]:
            super()._brpop_start(timeout)  # type: ignore[no-untyped-call]
            return
        if not self._taking_key:
            self._taking_key = f"{self.kept_queue}:taken:{uuid.uuid4().hex}"
            with self.conn_or_acquire() as client:
                self.say_alive(client)
        self._in_poll, self._brpop_sent_at, self._taking = self.client.connection, time.monotonic(), True
        if self._full:
            pause = timeout or self.brpop_timeout
            self._in_poll.send_command("BLPOP", f"{self.taken_key}:none", pause)  # nothing ever
        elif self._turn < len(self.priority_steps):
            source = self._q_for_pri(self.kept_queue, self.priority_steps[self._turn])  # type: ignore[no-untyped-call]
            self._in_poll.send_command("LMOVE", source, self.taken_key, "RIGHT", "LEFT")
        else:
            self._in_poll.send_command("BLMOVE", self.kept_queue, self.taken_key, "RIGHT", "LEFT", _LOOK_EVERY)
        self._full = False

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return self._take() if self._taking else super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except _UNREADABLE as error:
            _report(error)
            if self.taken:
                with self.conn_or_acquire() as client:
                    client.lrem(self.taken_key, 1, self.taken)
            raise Empty from None

    def _take(self) -> bool:
        self._taking, self.taken = False, b""
        try:
            try:
                self.taken = self.client.parse_response(self.client.connection, "LMOVE") or b""
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            except OutOfMemoryError as error:  # what is in the queue is safe there
                log.warning("fetching_delayed", queue=self.kept_queue, reason=str(error))
                self._full = True
            if not self.taken:
                self._turn = (self._turn + 1) % (len(self.priority_steps) + 1)
                raise Empty
            self._turn = 0
            self.connection._deliver(loads(self.taken.decode()), self.kept_queue)  # type: ignore[no-untyped-call]
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()  # type: ignore[no-untyped-call]

    @property
    def taken_key(self) -> str:
        """Where a message is between its queue and being noted."""
        return self._taking_key or f"{self.unacked_key}:none"

    def say_alive(self, client: Any) -> None:
        """What is in its list is this channel's still."""
        if self._taking_key:
            client.zadd(f"{self.kept_queue}:takers", {self._taking_key: time.time()})

    def restore_taken(self, client: Any, ended: float) -> None:
        """Put back what takers have left that were last alive before `ended`."""
        if self.kept_queue is None:
            return
        takers = f"{self.kept_queue}:takers"
        for taker in client.zrange(takers, 0, ended, byscore=True, offset=0, num=_RESTORE_MOST):
            while client.lmove(taker, self.kept_queue, "RIGHT", "RIGHT"):
                pass
            client.zrem(takers, taker)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Kombu's, as for a queue that lasts: the bindings of those that do not are kept up by scripts, which no role
        may run. A queue that is no more leaves a binding only where its process was killed."""
        expires = self._expires.pop(queue, None)
        super()._queue_bind(exchange, routing_key, pattern, queue)  # type: ignore[no-untyped-call]
        if expires is not None:
            self._expires[queue] = expires

    def maybe_refresh_binding_expiry(self) -> None:
        """There is none, see `_queue_bind`."""

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], object], consumer_tag: str, **options: Any
    ) -> Any:
        def deliver(message: Any) -> object:
            try:
                if not no_ack:  # without acknowledgement it is no task but an event, or remote control
                    _Task.model_validate(message.headers if "task" in message.headers else message.payload)
                elif isinstance(message.payload, dict) and "method" in message.payload:
                    _Command.model_validate(message.payload)
                return callback(message)
            except self.connection_errors:
                raise
            except Exception as error:  # whatever it is, the message has taken a place and must give it back
                _report(error)
                if not message.acknowledged:
                    message.reject()
                return None

        Channel.acknowledges |= not no_ack
        return super().basic_consume(queue, no_ack, deliver, consumer_tag, **options)  # type: ignore[no-untyped-call]


def _report(error: Exception) -> None:
    reason = field_errors(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
    log.warning("foreign_message", reason=f"not a Celery message: {reason[:200]}")


class Transport(redis.Transport):
    """The transport `redis://`, `rediss://` and `redis+socket://` mean once `install` was called."""

    Channel = Channel


class _NodeQoS(redis.QoS):
    """Counts what is unacknowledged without keeping it in Redis: the ledger knows what was sent to a node and what
    became of it, and places it anew when the worker is gone, so kombu's own copy of each message would be kept, and
    written and deleted in two more round trips per task, for nothing."""

    restore_at_shutdown = False

    def append(self, message: Any, delivery_tag: str) -> None:
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def ack(self, delivery_tag: str) -> None:
        full = not self.can_consume()  # type: ignore[no-untyped-call]
        virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
        if full and (loop := get_event_loop()) is not None:
            loop.call_soon(_look_again)  # type: ignore[no-untyped-call]  # it waits for other things, for up to a second

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:  # noqa: ARG002  the ledger requeues
        self.ack(delivery_tag)

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:
        """Nothing to restore."""


def _look_again() -> None:
    """Nothing: the loop asks before each wait whether it may fetch more."""


class NodeChannel(Channel):
    """A channel for a node's own queue, of which one trip to the server fetches as many messages as there are places:
    with one at a time, as kombu has it, the way there and back would bound a worker's rate whatever its slots."""

    QoS = _NodeQoS
    _in_poll: Any
    _brpop_sent_at: Any

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        keys = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]  # type: ignore[no-untyped-call]
        places = self.qos.can_consume_max_estimate() or 1
        self._in_poll, self._brpop_sent_at = self.client.connection, time.monotonic()
        wait = timeout or self.brpop_timeout
        self.client.connection.send_command("BLMPOP", wait, len(keys), *keys, "RIGHT", "COUNT", places)

    def _brpop_read(self, **_: Any) -> bool:
        """Kombu's, for what `_brpop_start` asked for. What cannot be read is no reason not to deliver the others."""
        try:
            reply = self.client.parse_response(self.client.connection, "BLMPOP")
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
        if not reply:
            raise Empty
        key, messages = reply
        queue, failure = key.decode().rsplit(self.sep, 1)[0], None
        for message in messages:
            try:
                self.connection._deliver(loads(message.decode()), queue)  # type: ignore[no-untyped-call]
            except self.connection_errors as error:
                failure = error
            except _UNREADABLE as error:
                _report(error)
        if failure is not None:
            raise failure
        return True


class NodeTransport(Transport):
    """The transport of a node's worker."""

    Channel = NodeChannel


def _moving(channel: type[Channel]) -> type[Channel]:
    """The same for a server that moves (kombu.transport.redis, SentinelChannel)."""
    options = (*channel.from_transport_options, "master_name", "sentinel_kwargs")
    return type(f"Moving{channel.__name__}", (channel, redis.SentinelChannel), {"from_transport_options": options})


class MovingTransport(Transport):
    """What `sentinel://` means."""

    default_port: Any = PORT
    Channel = _moving(Channel)


class MovingNodeTransport(NodeTransport):
    """The same for a node's worker."""

    default_port: Any = PORT
    Channel: Any = _moving(NodeChannel)


def install(*, node: bool) -> None:
    """Make ours the Redis transport of every kombu connection in this process: `node` for a node's worker."""
    near, moving = (NodeTransport, MovingNodeTransport) if node else (Transport, MovingTransport)
    for alias, transport in (("redis", near), ("rediss", near), (SCHEME, moving)):
        TRANSPORT_ALIASES[alias] = f"{__name__}:{transport.__name__}"
