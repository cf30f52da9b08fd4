"""Celery's results as the inbox needs them to send what follows a task: chords are counted, and those who wait for what
will never be sent are told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from celery import states
from celery.app.task import Context
from celery.backends.redis import CHORD_CLEANUP_LUA, CHORD_PART_RETURN_LUA
from celery.canvas import Signature
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import GroupResult, ResultBase
from celery.utils.functional import maybe_list

from perllm.broker.errors import InvalidTask, TaskExpired, TaskFailed, TaskRejected, Unreachable
from perllm.broker.functions import Function
from perllm.broker.ledger import EndKind, Ledger
from perllm.broker.queues.app import Backend

#: Seconds a chord's completion is one sender's.
CHORD_CLAIM = 10
#: Seconds a chord that is done is remembered, so that a part which returns twice does not begin it anew.
CHORD_DONE = 3600

#: Celery's own scripts, as functions: no role may run a script.
_PART_RETURN = Function("chord_part", CHORD_PART_RETURN_LUA, full=True)
_CLEANUP = Function("chord_done", CHORD_CLEANUP_LUA, full=True)

ERRORS: dict[EndKind, type[Exception]] = {
    "failed": TaskFailed,
    "expired": TaskExpired,
    "rejected": TaskRejected,
    "refused": InvalidTask,
    "revoked": TaskRevokedError,
    "chord": ChordError,
}
_KINDS: dict[str, EndKind] = {error.__name__: kind for kind, error in ERRORS.items()}


def signature(content: Mapping[str, Any], app: Any) -> Signature:
    """One of its own: Celery changes what it is given."""
    return Signature.from_dict(json.loads(json.dumps(content)), app=app)


class Results(Backend):
    """Celery's own, less what would be another truth beside the ledger's."""

    def __init__(self, ledger: Ledger, **options: Any) -> None:
        super().__init__(**options)
        self._ledger = ledger

    def on_task_call(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nobody waits here for what is sent."""
        return {}

    def add_pending_result(self, result: Any, *_: Any, **__: Any) -> Any:
        """The same."""
        return result

    def remove_pending_result(self, result: Any) -> Any:
        """The same."""
        return result

    def _store_result(self, task_id: str, result: Any, state: str, *_: Any, **__: Any) -> Any:
        """Of a task that will never be sent, since what it was to follow has failed."""
        if state in self.EXCEPTION_STATES:
            kind = _KINDS.get(str(result["exc_type"]), "refused")
            self._ledger.refuse(task_id, kind, "; ".join(map(str, result["exc_message"])))
        return result

    def _call_task_errbacks(self, request: Context, exc: Any, traceback: Any) -> None:  # noqa: ARG002
        """With the failed task's id: who knows their code is elsewhere."""
        for errback in maybe_list(request.errbacks) or ():
            parents = {"parent_id": request.id, "root_id": request.root_id}
            signature(errback, self.app).apply_async((request.id,), **parents)

    def on_chord_part_return(self, request: Context, state: str, result: Any, **_: Any) -> None:
        """Celery's protocol of counting, so that other workers may run parts of the same chord. Unlike Celery's own
        code, this one does not take an outage for the chord's failure. Raises Unreachable."""
        group, part = request.group, request.id
        if not group or not part:
            return
        keys = {name: self.get_key_for_group(group, f".{name}") for name in "jtsdc"}
        index = "+inf" if request.group_index is None else request.group_index
        token, expires = uuid4().hex, self.chord_expires or 0
        returned = self.encode([1, part, state, self.encode_result(result, state)])
        ready, more, size, claimed = _PART_RETURN.on(self.client)(
            [*(keys[name] for name in "jtsd"), self.get_key_for_group(group), keys["c"]],
            [part, returned, 1, index, expires, self._chord_result_expires, CHORD_CLAIM, token],
        )
        if ready == -1 or not size or ready != int(size) + int(more or 0):
            return
        if not claimed:  # whoever completes it may not live to do so
            raise Unreachable(f"the chord {group} is being completed")
        body = signature(request.chord, self.app)
        try:
            values = self._values(group, keys["j"])
        except ChordError as error:
            self.chord_error_from_stack(body, error)
            self.client.delete(keys["s"])
        else:
            body.apply_async((values,))
            _CLEANUP.on(self.client)([keys[name] for name in "cjtsd"], [token, CHORD_DONE])

    def _values(self, group: str, key: Any) -> list[Any]:
        """What the parts returned, in order. Raises ChordError where one failed."""
        returned: list[tuple[str, Any]] = []
        for raw in self.client.zrange(key, 0, -1):
            _, part, state, value = self.decode(raw)
            if state in states.PROPAGATE_STATES:
                said = f"{value['exc_type']}: {'; '.join(map(str, value['exc_message']))}"
                raise ChordError(f"{part} raised {said}")
            returned.append((part, value))
        kept = GroupResult.restore(group, app=self.app)
        return [value for _, value in returned] if kept is None else _in_shape(kept.results, dict(returned))


def _in_shape(results: Sequence[ResultBase], returned: Mapping[str, Any]) -> list[Any]:
    """What the parts returned, as the chord's groups are nested."""
    return [_in_shape(r.results, returned) if isinstance(r, GroupResult) else returned.get(r.id) for r in results]
