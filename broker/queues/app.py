"""The Celery side: one app configuration for the inbox and for every node, and the message a node's queue gets.

Celery moves work and shows it (Flower); the ledger is what is true. Messages are acknowledged early and no result is
stored by Celery itself: the ledger writes Celery's copy of a result in the same call that makes the task final, so
`AsyncResult(id).get()` ends for every final state. Remote control can look and cancel (`broker.control`).
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from celery import Celery, signals
from celery.app import backends
from celery.backends.redis import RedisBackend, SentinelBackend

from perllm.broker import extras
from perllm.broker.connection import CONNECT_TIMEOUT, NEAR_REPLY_TIMEOUT, connect, of_sentinels, reaching
from perllm.broker.errors import PerLLMError, exit_with
from perllm.broker.messages import WIRE_VERSION
from perllm.broker.queues import transport
from perllm.broker.sentinels import SCHEME
from perllm.broker.settings import Settings

#: The tasks plain Celery producers send, and the queue they send them to.
GENERATE = "perllm.generate"
EMBED = "perllm.embed"
INBOX = "inbox"
#: What is added to a queue's name for each priority (kombu.transport.redis).
_PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
#: How kombu notices a server that is gone without a word: a reply is awaited for so long, and a connection that should
#: have said something within 1 s + health_check_interval is dropped when next looked at (kombu.transport.redis).
NOTICE = {"socket_timeout": NEAR_REPLY_TIMEOUT, "health_check_interval": 5}
#: The task node queues carry.
RUN = "perllm.run"


class Backend(SentinelBackend):  # type: ignore[misc]
    """Celery's, of a server that stays or moves."""

    def _params_from_url(self, url: str, defaults: dict[str, Any]) -> Any:
        kind = SentinelBackend if url.startswith(f"{SCHEME}:") else RedisBackend
        return kind._params_from_url(self, url, defaults)

    def _get_pool(self, **params: Any) -> Any:
        kind = SentinelBackend if "hosts" in params else RedisBackend
        return kind._get_pool(self, **params)


class _Results(Backend):
    """Reads what the ledger wrote, for Flower. What Celery itself would write (that a message names no task, is revoked
    or has expired) would be written over the result of whatever task has the id the message gives."""

    def _store_result(self, task_id: str, result: Any, *_: Any, **__: Any) -> Any:  # noqa: ARG002
        return result

    def on_chord_part_return(self, *_: Any, **__: Any) -> None:
        """What follows a task is the inbox's to send, after the task's end and a check (`perllm.broker.inbox`)."""

    def _fail_chain(self, *_: Any, **__: Any) -> None:
        """The same."""

    def _call_task_errbacks(self, *_: Any, **__: Any) -> None:
        """The same."""


class _App(Celery):  # type: ignore[misc]
    events_cls = "perllm.broker.queues.events:Events"
    results: Callable[..., RedisBackend] = _Results

    def _get_backend(self) -> RedisBackend:
        _, url = backends.by_url(self.conf.result_backend, self.loader)
        return self.results(app=self, url=url)


def configuration(settings: Settings, *, queue: str = INBOX, concurrency: int = 1) -> dict[str, Any]:
    """Celery's settings (JSON only) for workers that consume `queue` with `concurrency` threads, and for those who send
    to them. A node's worker has as many messages again at hand, so that a thread that is free need not wait for the way
    to the server: a message is no more than a hint to claim."""
    is_node = queue != INBOX
    transport.install(node=is_node)
    if settings.log_json:
        signals.celeryd_after_setup.connect(_log_only, weak=False)
    made = {
        "broker_url": settings.celery_url,
        "result_backend": settings.celery_url,
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_default_queue": queue,
        "task_create_missing_queues": True,
        "task_ignore_result": True,
        "task_acks_late": False,
        "result_expires": int(settings.retention),
        "worker_consumer": "perllm.broker.queues.control:Consumer",
        "worker_disable_rate_limits": True,
        "worker_pool": "threads",
        "worker_concurrency": concurrency,
        "worker_prefetch_multiplier": 2 if is_node else 1,
        "worker_send_task_events": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,  # what a server refuses now (its disk is full, say) it will take later
        "broker_connection_timeout": CONNECT_TIMEOUT,
        "broker_transport_options": {**NOTICE, **transport_options(settings)},
        "redis_backend_health_check_interval": 15,
        "redis_socket_timeout": NEAR_REPLY_TIMEOUT,
    }
    if settings.sentinels is not None:
        made["result_backend_transport_options"] = transport_options(settings)
    if not settings.url.startswith("unix:"):
        made |= {
            "broker_transport_options": {**NOTICE, **transport_options(settings), "socket_keepalive": True},
            "redis_socket_keepalive": True,
            "redis_socket_connect_timeout": CONNECT_TIMEOUT,
        }
    return made


def _log_only(instance: Any = None, **_: Any) -> None:
    """Have Celery's worker print nothing past the log: neither its banner nor, in a signal's handler, where no logger
    may be used, that it stops."""
    from celery.apps import worker  # noqa: PLC0415  this is one

    instance.quiet = True

    def say(text: str, *_: Any) -> None:
        line = {"event": "celery", "text": text, "level": "info", "timestamp": datetime.now(UTC).isoformat()}
        with suppress(OSError):
            os.write(2, f"{json.dumps(line)}\n".encode())

    worker.safe_say = say


def transport_options(settings: Settings) -> dict[str, Any]:
    """What kombu's connections must be told beside the URL."""
    if settings.sentinels is None:
        return {}
    return {"master_name": settings.sentinels.name, "sentinel_kwargs": of_sentinels(settings.sentinels)}


def make_app(settings: Settings, *, queue: str = INBOX, concurrency: int = 1) -> Celery:
    """An app with this `configuration`."""
    return lazy_app(lambda: configuration(settings, queue=queue, concurrency=concurrency))


def lazy_app(configure: Callable[[], dict[str, Any]], results: Callable[..., RedisBackend] = _Results) -> Celery:
    """An app whose configuration is made when Celery first asks for it, as every command of its does. So its module can
    be imported anywhere, whatever the settings; a wrong one ends the command with one line and status 2. `results`
    makes its result backend."""

    def configure_or_exit() -> dict[str, Any]:
        try:
            return configure()
        except PerLLMError as error:
            exit_with(error)
        except ModuleNotFoundError as error:  # an engine's
            exit_with(extras.lacking("this worker's engine", error))

    app = _App("perllm")
    app.results = results
    app.add_defaults(configure_or_exit)
    return app


def queue_lengths(settings: Settings, names: Iterable[str]) -> dict[str, int]:
    """Messages that wait in these queues, of all priorities; without those that this user may not see. Raises
    Unreachable."""
    names = list(names)
    with reaching(settings), connect(settings, reply_timeout=NEAR_REPLY_TIMEOUT) as client:
        pipe = client.pipeline(transaction=False)
        for step in _PRIORITIES:
            for name in names:
                pipe.llen(f"{name}{step}")
        replies = pipe.execute(raise_on_error=False)
    lengths = {name: replies[i :: len(names)] for i, name in enumerate(names)}
    return {name: sum(counts) for name, counts in lengths.items() if all(isinstance(n, int) for n in counts)}


#: Where the ledger puts the start of the prompt in a node's message, for Flower and other people.
PREVIEW = "@preview@"


def node_message(task_id: str, attempt: int, queue: str) -> str:
    """The Celery message (protocol 2, as kombu's Redis transport keeps it in a list) that tells a node's worker to
    claim an attempt. Keyword arguments: `attempt` and `v`; the prompt comes with the claim. `PREVIEW` in it is for the
    ledger to replace, since the scheduler does not know the prompt.

    Built here rather than published through kombu, so that the ledger can push it in the same atomic call that marks
    the task dispatched. Source: docs.celeryq.dev, "Message Protocol", version 2.
    """
    arguments = {"attempt": attempt, "v": WIRE_VERSION}
    body = [[], arguments, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    headers: dict[str, Any] = {
        "lang": "py",
        "task": RUN,
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "group": None,
        "group_index": None,
        "shadow": None,
        "retries": 0,
        "eta": None,
        "expires": None,
        "timelimit": [None, None],
        "argsrepr": "()",
        "kwargsrepr": f"{{'attempt': {attempt}, 'prompt': '{PREVIEW}'}}",
        "origin": "perllm-scheduler",
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
    message = {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": task_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
        },
    }
    return json.dumps(message)
