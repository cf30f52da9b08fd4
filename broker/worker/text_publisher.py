"""Publishes a task's text while it is generated, for a producer who asked to watch."""

from __future__ import annotations

import time

import structlog

from perllm.broker.errors import Unreachable
from perllm.broker.ledger import SAY_EVERY, Ledger
from perllm.broker.messages import whole_text

log = structlog.get_logger(__name__)


class TextPublisher:
    """The engine's `on_text` for one attempt: pieces are gathered for `SAY_EVERY` s. It stops for good when the
    server does not answer or the attempt is void; the whole text comes with the result in any case."""

    def __init__(self, ledger: Ledger, task_id: str, attempt: int, token: str) -> None:
        self._ledger, self._task_id, self._attempt, self._token = ledger, task_id, attempt, token
        self._pending: list[str] = []
        self._next_at = float("-inf")
        self._stopped = False

    def __call__(self, piece: str) -> None:
        now = time.monotonic()
        self._pending.append(piece)
        if self._stopped or now < self._next_at:
            return
        text = whole_text("".join(self._pending))
        self._pending.clear()
        self._next_at = now + SAY_EVERY
        try:
            self._stopped = self._ledger.say(self._task_id, self._attempt, self._token, text) != "ok"
        except Unreachable as error:
            log.warning("text_unpublished", task_id=self._task_id, reason=str(error))
            self._stopped = True
