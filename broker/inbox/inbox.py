"""What becomes of a Celery message: a task in the ledger, under the message's own id, or a sentence why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog
from celery.app.task import Context

from perllm.broker.errors import InvalidTask, PerLLMError
from perllm.broker.inbox import arguments, request
from perllm.broker.inbox.events import Events
from perllm.broker.inbox.followers import Followers
from perllm.broker.inbox.sender import Sender, Unsendable
from perllm.broker.ledger import EndKind, Ledger, is_id
from perllm.broker.queues.app import EMBED
from perllm.broker.settings import Settings
from perllm.broker.traceparent import valid_traceparent
from perllm.broker.validation import TaskValidator

log = structlog.get_logger(__name__)


class Inbox:
    """Takes messages in. `sender` sends what follows their tasks; what of it is for the inbox comes straight here."""

    def __init__(self, settings: Settings, ledger: Ledger, events: Events) -> None:
        self._ledger, self._events = ledger, events
        self._validator = TaskValidator(settings, ledger)
        self.sender = Sender(settings, ledger, self._take_in_directly)

    def take_in(self, message: Context, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Submit a message's task, or tell all who may wait for it why it becomes none. Raises Unreachable, to be
        repeated: that does no harm."""
        try:
            self._submit(message, args, kwargs)
        except arguments.Expired as error:
            self._refuse(message, "revoked", str(error))
        except InvalidTask as error:
            self._refuse(message, "refused", str(error))
        except PerLLMError:
            raise
        except Exception as error:  # a bug of ours: nobody shall wait for ever
            log.exception("submission_failed", task_id=message.id)
            self._refuse(message, "refused", f"the inbox failed on it: {type(error).__name__}: {error}")

    def _take_in_directly(self, message: Context, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._events.received(message)
        self.take_in(message, args, kwargs)

    def _submit(self, message: Context, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        task_id = message.id
        if not is_id(task_id):
            raise InvalidTask(
                f"the message's id must be at most 255 letters, digits and any of ._:- (given {task_id[:40]!r})"
            )
        followers = Followers.of(message)
        if followers is not None:
            self.sender.check(followers.checked(task_id))
        if message.task == EMBED:
            kwargs = {**kwargs, "kind": "embed"}
        fields = arguments.fields_of(args, kwargs)
        progress = fields.pop("progress", False)
        if not isinstance(progress, bool):
            raise InvalidTask("progress: must be true or false")
        if traceparent := valid_traceparent(message.get("traceparent")):
            fields.setdefault("traceparent", traceparent)
        times = message.get(request.ETA), message.get(request.EXPIRES)
        priority = (message.delivery_info or {}).get("priority")
        spec = self._validator.accept(arguments.with_options(fields, *times, priority, self._ledger.now))
        written = followers.written() if followers else ""
        in_force = self._ledger.submit_from_celery(task_id, spec, written, progress=progress)
        log.info("task_submitted", task_id=in_force, tenant=spec.tenant, service=spec.service, **spec.origin())
        if in_force != task_id:  # nothing will ever be stored under this id
            raise InvalidTask(
                f"idempotency_key: {spec.idempotency_key!r} is task {in_force}'s: ask for its result instead"
            )

    def _refuse(self, message: Context, kind: EndKind, reason: str) -> None:
        log.info("task_refused", task_id=message.id, reason=reason)
        self._ledger.refuse(message.id, kind, reason)
        with suppress(InvalidTask):  # it cannot be read
            if (followers := Followers.of(message)) is not None:
                try:
                    self.sender.check(followers.checked(message.id))
                    self.sender.failed(message.id, followers, kind, reason)
                except (InvalidTask, Unsendable):
                    self.sender.refuse(followers, reason)
        self._events.ended(message.id, kind, reason)
