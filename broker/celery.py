"""`celery -A perllm.broker worker`: the inbox, for plain Celery producers in any language.

They send `perllm.generate` or `perllm.embed` with a TaskSpec's fields as keyword arguments. It is submitted to the
ledger under the message's own id and answers nothing itself: the producer's `AsyncResult` shows what the ledger writes
under that id as the task starts and ends. What is to follow it (a chain, a chord, callbacks) is sent when it has
ended.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import structlog
from celery import Task, signals
from celery.app.task import Context
from celery.exceptions import Ignore, Reject
from kombu.exceptions import OperationalError

from perllm.broker import connection, logs
from perllm.broker.errors import InvalidTask, PerLLMError, Unreachable, exit_with
from perllm.broker.inbox import arguments, request
from perllm.broker.inbox.followers import Followers
from perllm.broker.inbox.following import Following
from perllm.broker.inbox.sender import Sender, Unsendable
from perllm.broker.ledger import EndKind, Ledger, is_id
from perllm.broker.messages import Result, State
from perllm.broker.queues import control
from perllm.broker.queues.app import EMBED, GENERATE, configuration, lazy_app
from perllm.broker.settings import load_settings
from perllm.broker.traceparent import valid_traceparent
from perllm.broker.validation import TaskValidator

#: Seconds after which a message that an inbox took and did not finish (it was killed) is taken up again.
REDELIVERY = 60.0
#: Where such messages are noted, apart from those of a producer's own Celery workers on this server.
UNACKED = {
    "unacked_key": "inbox:unacked",
    "unacked_index_key": "inbox:unacked_index",
    "unacked_mutex_key": "inbox:unacked_mutex",
}
#: Seconds between tries to submit a task while the server does not take it, at random.
RETRY_PAUSE = (0.2, 1.0)

log = structlog.get_logger(__name__)


_stopping = threading.Event()


class _Inbox:
    """What the inbox works with, made when Celery asks how it is configured."""

    def configure(self) -> dict[str, Any]:
        """Raises PerLLMError."""
        self.settings = load_settings()
        self.ledger = Ledger(self.settings, reply_timeout=connection.NEAR_REPLY_TIMEOUT)
        self.validator = TaskValidator(self.settings, self.ledger)
        self.sender = Sender(self.settings, self.ledger)
        self.following = Following(self.ledger, self.sender, self._show_end)
        made = configuration(self.settings, concurrency=4)
        made["broker_transport_options"] |= {"visibility_timeout": REDELIVERY, **UNACKED}
        signals.celeryd_init.connect(self._log, weak=False)
        signals.setup_logging.connect(self._log, weak=False)
        signals.worker_init.connect(self._check, weak=False)
        signals.worker_ready.connect(self._follow, weak=False)
        signals.worker_shutting_down.connect(self._stop, weak=False)
        signals.worker_shutdown.connect(self._close, weak=False)
        signals.task_unknown.connect(self._unknown, weak=False)
        return made

    def _log(self, **_: Any) -> None:
        logs.configure(self.settings)

    def _check(self, **_: Any) -> None:
        control.restrict(self.ledger)
        try:
            connection.check(self.settings)
        except PerLLMError as error:
            exit_with(error)

    def _follow(self, sender: Any = None, **_: Any) -> None:
        self._hostname = sender.hostname
        self.following.start()

    def _show_end(self, result: Result) -> None:
        """In Flower."""
        with suppress(OperationalError), app.events.default_dispatcher(hostname=self._hostname) as events:
            if result.state is State.CANCELLED:
                events.send("task-revoked", uuid=result.id, terminated=False, signum=None, expired=False)
            else:
                said = f"{result.state}: {result.reason}"
                events.send("task-failed", uuid=result.id, exception=said, traceback="")

    def _stop(self, **_: Any) -> None:
        _stopping.set()

    def _close(self, **_: Any) -> None:
        self.following.close()

    def _unknown(self, name: str = "", id: str = "", **_: Any) -> None:
        """A message that Celery itself lets become no task."""
        try:
            self.ledger.refuse(id, "refused", f"there is no task {name[:80]!r}: send {GENERATE!r} or {EMBED!r}")
        except Unreachable as error:
            log.warning("refusal_not_stored", task_id=id, reason=str(error))

    def submit(self, message: Context, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Submit a message's task under its id. Raises InvalidTask, Unreachable."""
        task_id = message.id
        if not is_id(task_id):
            raise InvalidTask(
                f"the message's id must be at most 255 letters, digits and any of ._:- (given {task_id[:40]!r})"
            )
        followers = Followers.of(message)
        if followers is not None:
            self.sender.check(followers.checked(task_id))
        fields = arguments.fields_of(args, kwargs)
        progress = fields.pop("progress", False)
        if not isinstance(progress, bool):
            raise InvalidTask("progress: must be true or false")
        if traceparent := valid_traceparent(message.get("traceparent")):
            fields.setdefault("traceparent", traceparent)
        times = message.get(request.ETA), message.get(request.EXPIRES)
        priority = (message.delivery_info or {}).get("priority")
        spec = self.validator.accept(arguments.with_options(fields, *times, priority, self.ledger.now))
        written = followers.written() if followers else ""
        in_force = self.ledger.submit_from_celery(task_id, spec, written, progress=progress)
        log.info("task_submitted", task_id=in_force, tenant=spec.tenant, service=spec.service, **spec.origin())
        if in_force != task_id:  # nothing will ever be stored under this id
            raise InvalidTask(
                f"idempotency_key: {spec.idempotency_key!r} is task {in_force}'s: ask for its result instead"
            )

    def refuse(self, message: Context, kind: EndKind, reason: str) -> None:
        """Tell the producer that its message becomes no task, and what was to follow it. Raises Unreachable."""
        self.ledger.refuse(message.id, kind, reason)
        with suppress(InvalidTask):  # it cannot be read
            followers = Followers.of(message)
            if followers is None:
                return
            try:
                self.sender.check(followers.checked(message.id))
                self.sender.failed(message.id, followers, kind, reason)
            except (InvalidTask, Unsendable):
                self.sender.refuse(followers, reason)


_inbox = _Inbox()
app = lazy_app(_inbox.configure)


def submit(task: Task, *args: Any, **fields: Any) -> None:
    """Submit to the ledger under this message's id, or tell the producer why not."""
    _take_in(task, args, fields)
    raise Ignore


for _name in (GENERATE, EMBED):
    app.task(
        submit,
        bind=True,
        name=_name,
        typing=False,
        acks_late=True,  # submitting the same id twice does no harm, losing one would
        Strategy="perllm.broker.inbox.request:strategy",
        Request="perllm.broker.inbox.request:Arrival",
    )


def _take_in(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    message: Context = task.request
    if task.name == EMBED:
        kwargs = {**kwargs, "kind": "embed"}
    try:
        _retry(message.id, partial(_inbox.submit, message, args, kwargs))
    except InvalidTask as error:
        expired, reason = isinstance(error, arguments.Expired), str(error)
        log.info("task_refused", task_id=message.id, reason=reason)
        _retry(message.id, partial(_inbox.refuse, message, "revoked" if expired else "refused", reason))
        if expired:
            task.send_event("task-revoked", terminated=False, signum=None, expired=True)
        else:
            task.send_event("task-failed", exception=f"InvalidTask({reason!r})", traceback="")


def _retry(task_id: str, call: Callable[[], None]) -> None:
    """Until the server takes it: nobody else has the message. Who stops meanwhile puts it back."""
    while True:
        try:
            return call()
        except Unreachable as error:
            log.warning("submission_delayed", task_id=task_id, reason=str(error))
            if _stopping.wait(random.uniform(*RETRY_PAUSE)):
                raise Reject(str(error), requeue=True) from None
