"""Sends what follows a Celery producer's task, once it has ended.

Celery's own workers do this after they have run a task. Here nobody runs it in that sense: the ledger stores the
result, and tells of what is to follow (`Ledger.follow`) until that is sent. Whoever dies between the two has it sent
again, under the same ids: a task of ours runs once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import redis
import structlog
from celery import Celery, states
from celery.app.task import Context
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from perllm.broker.connection import reaching
from perllm.broker.errors import InvalidTask, PerLLMError, Unreachable
from perllm.broker.inbox.followers import MAX_SIGNATURES, Followers
from perllm.broker.inbox.request import ETA, EXPIRES
from perllm.broker.inbox.results import ERRORS, Results, signature
from perllm.broker.ledger import EndKind, Ledger
from perllm.broker.messages import new_id, whole_text
from perllm.broker.queues.app import EMBED, GENERATE, INBOX, configuration, lazy_app
from perllm.broker.settings import Settings

#: Celery's default queue, where tasks go that are not ours and name none.
DEFAULT_QUEUE = "celery"
_KNOWN = f"_kombu.binding.{DEFAULT_QUEUE}"
#: Queues that have been sent to and are remembered by Celery.
_MAX_QUEUES = 1_000

#: Of a signature's options, those that are part of the message.
_MESSAGE = frozenset({
    "countdown", "eta", "expires", "group_id", "group_index", "chord", "chain", "root_id", "parent_id", "reply_to",
    "time_limit", "soft_time_limit", "shadow",
})  # fmt: skip

log = structlog.get_logger(__name__)


class Unsendable(PerLLMError):
    """What is to follow a task can never be sent."""


class Sender:
    """Sends what follows tasks. Every method raises Unreachable where the server cannot take it now: to be repeated,
    which does no harm; and Unsendable for what it will never take. `take_in` is given messages to the inbox itself."""

    def __init__(self, settings: Settings, ledger: Ledger, take_in: Callable[[Context, list[Any], Any], Any]) -> None:
        self._settings, self._ledger, self._take_in = settings, ledger, take_in
        self._app = lazy_app(self._configure, results=lambda app, url: Results(ledger, app=app, url=url))
        self._app.send_task = self._send_task  # it knows no task, so all are sent by their names

    def _configure(self) -> dict[str, Any]:
        return configuration(self._settings) | {"task_default_queue": DEFAULT_QUEUE, "task_ignore_result": False}

    def _send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> AsyncResult:
        """Celery's; but a message to the inbox is taken in at once, and so cannot be lost on its way."""
        if name not in (GENERATE, EMBED) or options.get("queue") not in (None, INBOX):
            return Celery.send_task(self._app, name, args, kwargs, **options)
        task_id, priority = options.pop("task_id", None) or new_id(), options.pop("priority", None)
        links = {"callbacks": _list(options.pop("link", None)), "errbacks": _list(options.pop("link_error", None))}
        options = {key: value for key, value in options.items() if key in _MESSAGE}
        made = self._app.amqp.as_task_v2(task_id, name, args, kwargs, **links, **options)
        args, kwargs, embed = json.loads(json.dumps(made.body))  # as it would arrive
        times = {ETA: made.headers["eta"], EXPIRES: made.headers["expires"]}
        self._take_in(Context(made.headers | embed | times | {"delivery_info": {"priority": priority}}), args, kwargs)
        return self._app.AsyncResult(task_id)

    def check(self, followers: Followers) -> None:
        """Whether the server would take it. Raises InvalidTask, Unreachable."""
        for queue, task in followers.queues(DEFAULT_QUEUE).items():
            try:  # changes nothing, and is refused as sending would be
                self._try(partial(self._app.backend.client.ltrim, queue, 0, -1))
            except Unsendable as error:
                raise InvalidTask(f"{task}: the queue {queue!r} takes nothing from here: {error}") from None
            if queue == DEFAULT_QUEUE and not self._try(lambda: self._app.backend.client.exists(_KNOWN)):
                raise InvalidTask(
                    f"{task}: it names no queue, and nobody has ever listened to Celery's default one here: name "
                    "its queue with .set(queue=...), or start its worker first"
                )

    def succeeded(self, task_id: str, followers: Followers, answer: Any) -> None:
        """Send what follows a success, whose result is `answer`."""
        parents = {"parent_id": task_id, "root_id": followers.root}

        def send() -> None:
            for callback in followers.callbacks:
                signature(callback, self._app).apply_async((answer,), **parents)
            if followers.chain:
                *rest, following = followers.chain
                signature(following, self._app).apply_async((answer,), chain=rest, **parents)
            if followers.chord is not None:
                self._app.backend.on_chord_part_return(_request(task_id, followers), states.SUCCESS, answer)

        self._try(send)

    def failed(self, task_id: str, followers: Followers, kind: EndKind, reason: str) -> None:
        """The rest of the chain and the chord fail as the task did, and the error callbacks are sent: not after a
        revocation, as with Celery's own workers."""
        state = states.REVOKED if kind == "revoked" else states.FAILURE
        error, request = ERRORS[kind](reason), _request(task_id, followers)
        self._try(
            lambda: self._app.backend.mark_as_failure(
                task_id, error, request=request, state=state, call_errbacks=state == states.FAILURE
            )
        )

    def refuse(self, followers: Followers, reason: str) -> None:
        """Tell all who may wait for something in it that it is not to come."""
        for task_id in followers.ids()[:MAX_SIGNATURES]:
            self._ledger.refuse(task_id, "refused", reason)

    def _try(self, send: Callable[[], Any]) -> Any:
        self._forget_queues()
        try:
            with reaching(self._settings):
                try:
                    return send()
                except redis.exceptions.NoPermissionError as error:
                    raise Unsendable(whole_text(str(error))) from None
                except OperationalError as error:  # kombu's, around the server's own
                    if isinstance(error.__cause__, redis.exceptions.NoPermissionError):
                        raise Unsendable(whole_text(str(error))) from None
                    raise error.__cause__ or Unreachable(str(error)) from None
        except PerLLMError:
            raise
        except Exception as error:  # whatever a producer's signature made of Celery's code
            log.warning("followers_unsendable", reason=f"{type(error).__name__}: {error}")
            raise Unsendable(whole_text(f"{type(error).__name__}: {error}")[:500]) from None

    def _forget_queues(self) -> None:
        queues = self._app.amqp.queues
        if len(queues) > _MAX_QUEUES:
            for name in list(queues):
                queues.pop(name, None)


def _list(given: Any) -> list[Any] | None:
    return given if given is None or isinstance(given, list) else [given]


def _request(task_id: str, followers: Followers) -> Context:
    """As Celery's code wants to see the message of the task."""
    return Context(
        {
            "id": task_id,
            "task": GENERATE,
            "root_id": followers.root,
            "chain": followers.chain,
            "chord": followers.chord,
            "group": followers.group,
            "group_index": followers.group_index,
            "errbacks": followers.errbacks,
            "delivery_info": {},
        }
    )
