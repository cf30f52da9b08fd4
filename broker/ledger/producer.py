"""The ledger as producers use it: hand in tasks, cancel and forget them, end what is overdue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

from perllm.broker.connection import reaching
from perllm.broker.ledger.base import LedgerBase
from perllm.broker.ledger.records import EndKind, Entry, Stored, entry, idempotency_name, state_of, text_of
from perllm.broker.ledger.script import Argument, Call, call
from perllm.broker.messages import State, TaskSpec

#: Tasks and bytes of payload per call of `submit`: bounds how long one call holds the server.
SUBMIT_TASKS = 100
SUBMIT_BYTES = 1 << 20

#: Calls of `submit` on their way at once: few enough for the socket's buffer, so that the client goes on meanwhile.
SUBMIT_CALLS = 3

#: Tasks of each state ended per call of `expire`.
EXPIRE_LIMIT = 500

#: Ids revoked before they were submitted that are kept, and s for which each is.
REVOKED, REVOKED_FOR = 50_000, 86_400.0


class Producer(LedgerBase):
    """See Ledger."""

    def submit(self, tasks: Iterable[tuple[str, TaskSpec]]) -> list[str]:
        """Store tasks as pending, each under its id. Returns the id in force for each, in order: its own, or that of
        the first task submitted with the same tenant and idempotency key. An id that exists is left as it is.

        Sent in pipelined pieces, so `tasks` may be a long iterator. If this raises, a beginning of them may have been
        stored; submitting the same ids again is harmless. Raises InvalidTask for one that cannot be written.
        """
        return [stored.id for stored in self.store(entry(task_id, spec) for task_id, spec in tasks)]

    def store(self, entries: Iterable[Entry]) -> list[Stored]:
        """`submit` for tasks that are written already."""
        calls = self._submissions(entries)
        pieces = iter(lambda: list(islice(calls, SUBMIT_CALLS)), [])
        with reaching(self.settings):
            return [stored for replies in self._script.stream(pieces) for stored in _stored(replies)]

    @staticmethod
    def _submissions(entries: Iterable[Entry]) -> Iterator[Call]:
        each: list[Argument] = []
        size = 0
        for written in entries:
            each += written
            size += len(written.payload) + len(written.followers)
            if len(each) >= len(Entry._fields) * SUBMIT_TASKS or size > SUBMIT_BYTES:
                yield call("submit", each)
                each, size = [], 0
        if each:
            yield call("submit", each)

    def holders(self, tenant: str, keys: Sequence[str]) -> list[str | None]:
        """The tasks that were submitted with these idempotency keys, None where there is none, in order."""
        if not keys:
            return []
        with reaching(self.settings):
            names = [f"{self._prefix}key:{idempotency_name(tenant, key)}" for key in keys]
            return [text_of(raw) if raw else None for raw in cast("list[bytes | None]", self._client.mget(names))]

    def cancel(self, task_id: str) -> State | None:
        """End a task as cancelled. Returns the state it was found in (a final one stays as it is), None if unknown."""
        return state_of(self._call("cancel", id=task_id))

    def cancel_many(self, task_ids: Sequence[str]) -> list[State | None]:
        """`cancel` for many, in one round trip."""
        return [state_of(r) for r in self._pipeline([call("cancel", id=i) for i in task_ids])]

    def revoke(self, task_ids: Sequence[str]) -> list[State | None]:
        """`cancel` for Celery's producers, whose message may still be on its way: an id that is not known (None) is
        cancelled as soon as it is submitted."""
        calls = [
            call("revoke", task_ids[start : start + SUBMIT_TASKS], keep=REVOKED_FOR, most=REVOKED)
            for start in range(0, len(task_ids), SUBMIT_TASKS)
        ]
        return [State(was.decode()) if was else None for reply in self._pipeline(calls) for was in reply]

    def submit_from_celery(self, task_id: str, spec: TaskSpec, followers: str = "", *, progress: bool = False) -> str:
        """`submit` for a Celery producer, whose `AsyncResult` is told when the task has begun and, with `progress`, how
        many tokens there are so far. Once it has ended, `follow` tells of the `followers`, if any."""
        telling = "started progress" if progress else "started"
        return self.store([entry(task_id, spec)._replace(celery=telling, followers=followers)])[0].id

    def refuse(self, task_id: str, kind: EndKind, reason: str) -> None:
        """Have the Celery producer of a message told that it becomes no task. Where a task has the id, or the producer
        was told something else, nothing comes of it."""
        self._call("refuse", id=_whole(task_id), kind=kind, reason=_whole(reason))

    def follow(self, limit: int, again: float) -> list[tuple[str, str]]:
        """Some tasks of Celery's producers that have ended, and what is to follow them; '' for one of which nobody but
        the ledger knows that it has ended. Each is told of again after `again` s, to whoever asks, until `followed`."""
        reply = [text_of(raw) for raw in self._call("follow", limit=limit, again=again)]
        return list(zip(reply[::2], reply[1::2], strict=True))

    def followed(self, task_ids: Sequence[str]) -> None:
        """What follows these tasks has been sent."""
        self._pipeline([call("followed", id=i) for i in task_ids])

    def expire(self) -> int:
        """End what is overdue, whosoever it is; returns how many. Nothing comes of it while a scheduler or a worker is
        there to do so: those who wait for results call it when these should have been there."""
        return int(self._call("expire", limit=EXPIRE_LIMIT))

    def forget(self, task_id: str) -> bool:
        """Drop a task and all that is kept of it, its prompt, text and result; it is cancelled first if it goes on.
        False if there is none."""
        return self._call("forget", id=task_id) is not None

    def forget_many(self, task_ids: Sequence[str]) -> None:
        """`forget` for many, in one round trip."""
        self._pipeline([call("forget", id=i) for i in task_ids])


def _stored(replies: list[Any]) -> list[Stored]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [Stored(task_id.decode(), float(at)) for *ids, at in replies for task_id in ids]


def _whole(text: str) -> bytes:
    return text.encode("utf-8", "replace")
