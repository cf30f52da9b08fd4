"""Submissions of many requests in few calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice

import structlog

from broker.errors import InvalidTask, Unreachable
from broker.ledger import Entry, Ledger, entry
from broker.messages import TaskSpec

log = structlog.get_logger(__name__)
Tasks = list[tuple[str, TaskSpec]]


class Intake:
    """Tasks that come while one call to the ledger is under way go together in the next: a busy server makes few and
    large calls, an idle one answers at once. What is wrong with one request's tasks is no other's concern."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[tuple[Tasks, asyncio.Future[list[str]]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, tasks: Tasks) -> list[str]:
        """See Ledger.submit."""
        stored: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._waiting.append((tasks, stored))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return await stored

    async def _send(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                try:
                    outcomes = await asyncio.to_thread(self._store, [tasks for tasks, _ in group])
                except Exception as error:
                    outcomes = [error] * len(group)
                for (_, stored), outcome in zip(group, outcomes, strict=True):
                    if stored.done():
                        continue
                    if isinstance(outcome, Exception):
                        stored.set_exception(outcome)
                    else:
                        stored.set_result(outcome)
        finally:
            self._sender = None

    def _store(self, requests: Sequence[Tasks]) -> list[list[str] | Exception]:
        """What became of each request: the ids in force, or why nothing. Raises Unreachable."""
        written = [_written(tasks) for tasks in requests]
        good = [entries for entries in written if not isinstance(entries, Exception)]
        try:
            ids = iter(self._ledger.store(each for entries in good for each in entries))
            return [w if isinstance(w, Exception) else list(islice(ids, len(w))) for w in written]
        except Unreachable:
            raise
        except Exception as error:  # one of them; the same ids again do no harm
            log.exception("submissions_apart", requests=len(requests), reason=str(error))
            return [w if isinstance(w, Exception) else self._store_alone(w) for w in written]

    def _store_alone(self, entries: list[Entry]) -> list[str] | Exception:
        try:
            return self._ledger.store(entries)
        except Exception as error:
            return error


def _written(tasks: Tasks) -> list[Entry] | InvalidTask:
    try:
        return [entry(task_id, spec) for task_id, spec in tasks]
    except InvalidTask as error:
        return error
