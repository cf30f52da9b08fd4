"""Submissions of many requests in few calls."""

from __future__ import annotations

import asyncio
from itertools import islice

from perllm.broker.ledger import Ledger
from perllm.broker.messages import TaskSpec


class SubmitCoalescer:
    """Tasks that come while one call to the ledger is under way go together in the next: a busy server makes few and
    large calls, an idle one answers at once."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[tuple[list[tuple[str, TaskSpec]], asyncio.Future[list[str]]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, tasks: list[tuple[str, TaskSpec]]) -> list[str]:
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
                    together = [task for tasks, _ in group for task in tasks]
                    ids = iter(await asyncio.to_thread(self._ledger.submit, together))
                except Exception as error:
                    for _, stored in group:
                        if not stored.done():
                            stored.set_exception(error)
                    continue
                for tasks, stored in group:
                    mine = list(islice(ids, len(tasks)))
                    if not stored.done():
                        stored.set_result(mine)
        finally:
            self._sender = None
