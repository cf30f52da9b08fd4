"""What a Celery producer wants to follow its task: callbacks, error callbacks, the rest of a chain, a chord's body.

These are signatures of Celery's, written by the producer and sent with the inbox's rights, so they are checked before
they are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Self
from uuid import NAMESPACE_OID, uuid5

from celery.app.task import Context
from celery.canvas import Signature
from pydantic import Field
from pydantic_core import PydanticSerializationError

from perllm.broker.errors import InvalidTask
from perllm.broker.ledger import is_id
from perllm.broker.messages import TolerantModel, check_depth
from perllm.broker.queues.app import EMBED, GENERATE, INBOX

#: Most signatures that may follow a task, and most bytes of them; and what both multiply to at most, since Celery
#: copies callbacks into every task of a group.
MAX_SIGNATURES, MAX_BYTES, MAX_COPIED = 1_000, 1 << 20, 1 << 28
#: Names of queues a producer may have something sent to: not those that mean something on this server.
_QUEUE = re.compile(r"(?!edge\.|cloud\.|webhooks|celery-|celeryev|unacked)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
#: Options of a signature that are kept; `exchange` and its like would reach keys that are no queues.
_OPTIONS = frozenset({
    "task_id", "queue", "priority", "expires", "countdown", "eta", "time_limit", "soft_time_limit", "ignore_result",
    "link", "link_error", "chain", "chord", "group_id", "group_index", "root_id", "parent_id", "reply_to", "shadow",
    "headers",
})  # fmt: skip
_NO_OPTIONS = ("exchange", "exchange_type", "routing_key")


class Followers(TolerantModel):
    """What a message's producer wants to follow its task: Celery's signatures, as objects. Of `chain` the last comes
    next."""

    callbacks: list[dict[str, Any]] = Field(default_factory=list)
    errbacks: list[dict[str, Any]] = Field(default_factory=list)
    chain: list[dict[str, Any]] = Field(default_factory=list)
    chord: dict[str, Any] | None = None
    group: str | None = None
    group_index: int | None = None
    root: str | None = None

    @classmethod
    def of(cls, request: Context) -> Self | None:
        """Those of a message, if it has any, as far as they can be read. Raises InvalidTask."""
        given = {
            "callbacks": request.callbacks or [],
            "errbacks": request.errbacks or [],
            "chain": request.chain or [],
            "chord": request.chord,
        }
        if not any(given.values()):
            return None
        try:
            place = {"group": request.group, "group_index": request.group_index}
            return cls.model_validate({**given, **place, "root": request.root_id or request.id})
        except ValueError:
            raise InvalidTask("link, link_error, chain and chord must be Celery's signatures") from None

    def written(self) -> str:
        """To be kept."""
        return self.model_dump_json(exclude_defaults=True)

    def signatures(self) -> Iterator[dict[str, Any]]:
        """Every signature in it, those within others too."""
        level: list[Any] = [self.callbacks, self.errbacks, self.chain, self.chord]
        while level:
            inner: list[Any] = []
            for each in level:
                if isinstance(each, dict):
                    if "task" in each and isinstance(each.get("options"), dict):
                        yield each
                    inner += each.values()
                elif isinstance(each, list | tuple):
                    inner += each
            level = inner

    def ids(self) -> list[str]:
        """Those of the tasks in it that have one: somebody may wait for each."""
        found = (signature["options"].get("task_id") for signature in self.signatures())
        return list(dict.fromkeys(i for i in found if isinstance(i, str) and is_id(i)))

    def queues(self, default: str) -> dict[str, str]:
        """Where it is to be sent but to the inbox, and a task that goes there; `default` is for those of others that
        name none."""
        found = {}
        for signature in self.signatures():
            queue = signature["options"].get("queue") or (None if signature.get("subtask_type") else default)
            if queue not in (None, INBOX):
                found[queue] = signature["task"]
        return found

    def checked(self, task_id: str) -> Self:
        """The same as it may be sent: bounded, to queues only, and under ids where it may be sent twice. Raises
        InvalidTask."""
        try:
            check_depth(self.model_dump())
            size = len(self.written().encode())
        except (ValueError, PydanticSerializationError) as error:
            raise InvalidTask(f"what follows it {str(error)[:200]}") from None
        for signature in self._first():
            if not isinstance(signature.get("task"), str) or not isinstance(signature.get("options"), dict):
                raise InvalidTask("link, link_error, chain and chord must be Celery's signatures")
        for count, signature in enumerate(self.signatures(), 1):
            if count > MAX_SIGNATURES or size > MAX_BYTES or count * size > MAX_COPIED:
                most = f"at most {MAX_SIGNATURES} tasks and {MAX_BYTES} bytes, {MAX_COPIED} bytes if each has all"
                raise InvalidTask(f"what follows it is too much: {most}")
            _check_signature(signature)
        if self.chord is not None and not self.group:
            raise InvalidTask("chord: the message names no group")
        for errback in self.errbacks:
            if (task := errback["task"]) in (GENERATE, EMBED) and not errback.get("immutable"):
                raise InvalidTask(f"link_error: {task} would be given a task's id: make it immutable, with .si()")
        for n, signature in enumerate((*self.callbacks, *self.errbacks)):
            if signature.get("subtask_type") is None:
                signature["options"].setdefault("task_id", str(uuid5(NAMESPACE_OID, f"{task_id} {n}")))
        return self

    def _first(self) -> list[dict[str, Any]]:
        return [*self.callbacks, *self.errbacks, *self.chain, *([] if self.chord is None else [self.chord])]


def _check_signature(signature: dict[str, Any]) -> None:
    task, options, kind = signature["task"], signature["options"], signature.get("subtask_type")
    if not isinstance(task, str) or not 0 < len(task) < 256:
        raise InvalidTask("what follows it has no name of a task")
    if kind is not None and not (isinstance(kind, str) and kind in Signature.TYPES):
        raise InvalidTask(f"what follows it is no signature of Celery's: {str(kind)[:40]!r}")
    if not isinstance(signature.get("args"), list | tuple) or not isinstance(signature.get("kwargs"), dict):
        raise InvalidTask(f"{task[:80]}: what follows it must have its arguments as a list and an object")
    for name in _NO_OPTIONS:
        if options.get(name) is not None:
            raise InvalidTask(f"{task[:80]}: {name} cannot be given to what follows a task; name a queue")
    queue, task_id = options.get("queue"), options.get("task_id")
    if queue is not None and not (isinstance(queue, str) and _QUEUE.fullmatch(queue)):
        raise InvalidTask(f"{task[:80]}: nothing can be sent to a queue {str(queue)[:80]!r} from here")
    if task_id is not None and not (isinstance(task_id, str) and is_id(task_id)):
        raise InvalidTask(f"{task[:80]}: its id must be at most 255 letters, digits and any of ._:-")
    signature["options"] = {name: value for name, value in options.items() if name in _OPTIONS}
    if task.startswith("perllm.") and kind is None:
        signature["options"].setdefault("queue", INBOX)
