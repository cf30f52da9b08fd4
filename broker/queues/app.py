"""The Celery side: one app configuration for the inbox and for every node, and the message a node's queue gets.

Celery moves work and shows it (Flower); the ledger is what is true. Messages are acknowledged early and no result is
stored by Celery itself: the ledger writes Celery's copy of a result in the same call that makes the task final, so
`AsyncResult(id).get()` ends for every final state. Remote control can look and cancel (`broker.control`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.app import backends
from celery.backends.redis import RedisBackend

from perllm.broker.connection import CONNECT_TIMEOUT, NEAR_REPLY_TIMEOUT
from perllm.broker.errors import PerLLMError, exit_with
from perllm.broker.messages import WIRE_VERSION
from perllm.broker.queues import transport
from perllm.broker.settings import Settings

#: The task plain Celery producers send, and the queue they send it to.
GENERATE = "perllm.generate"
EMBED = "perllm.embed"
INBOX = "inbox"
#: How kombu notices a server that is gone without a word: a reply is awaited for so long, and a connection that should
#: have said something within 1 s + health_check_interval is dropped when next looked at (kombu.transport.redis).
NOTICE = {"socket_timeout": NEAR_REPLY_TIMEOUT, "health_check_interval": 5}
#: The task node queues carry.
RUN = "perllm.run"


class _Results(RedisBackend):  # type: ignore[misc]
    """Reads what the ledger wrote, for Flower. What Celery itself would write (that a message names no task, is revoked
    or has expired) would be written over the result of whatever task has the id the message gives."""

    def _store_result(self, task_id: str, result: Any, *_: Any, **__: Any) -> Any:  # noqa: ARG002
        return result

    def on_chord_part_return(self, *_: Any, **__: Any) -> None:
        """No task of ours is a part of a chord, whatever a message says."""


class _App(Celery):  # type: ignore[misc]
    def _get_backend(self) -> _Results:
        _, url = backends.by_url(self.conf.result_backend, self.loader)
        return _Results(app=self, url=url)


def configuration(settings: Settings, *, queue: str = INBOX, concurrency: int = 1) -> dict[str, Any]:
    """Celery's settings (JSON only) for workers that consume `queue` with `concurrency` threads and no prefetch
    beyond, and for those who send to them."""
    transport.install(node=queue != INBOX)
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
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": True,
        "worker_send_task_events": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,  # what a server refuses now (its disk is full, say) it will take later
        "broker_connection_timeout": CONNECT_TIMEOUT,
        "broker_transport_options": dict(NOTICE),
        "redis_backend_health_check_interval": 15,
        "redis_socket_timeout": NEAR_REPLY_TIMEOUT,
    }
    if not settings.url.startswith("unix:"):
        made |= {
            "broker_transport_options": {**NOTICE, "socket_keepalive": True},
            "redis_socket_keepalive": True,
            "redis_socket_connect_timeout": CONNECT_TIMEOUT,
        }
    return made


def make_app(settings: Settings, *, queue: str = INBOX, concurrency: int = 1) -> Celery:
    """An app with this `configuration`."""
    return lazy_app(lambda: configuration(settings, queue=queue, concurrency=concurrency))


def lazy_app(configure: Callable[[], dict[str, Any]]) -> Celery:
    """An app whose configuration is made when Celery first asks for it, as every command of its does. So its module can
    be imported anywhere, whatever the settings; a wrong one ends the command with one line and status 2."""

    def configure_or_exit() -> dict[str, Any]:
        try:
            return configure()
        except PerLLMError as error:
            exit_with(error)

    app = _App("perllm")
    app.add_defaults(configure_or_exit)
    return app


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
