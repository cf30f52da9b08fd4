"""Publishes a task's answer while it is generated, for a producer who asked to watch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from perllm.broker.errors import Unreachable
from perllm.broker.ledger import SAY_TIME, Ledger
from perllm.broker.messages import Delta

#: Pieces are gathered for so many times as long as the last ones took to publish, and at most so long, s: a busy server
#: is told less often.
PAUSES, MAX_PAUSE = 5, 0.25

log = structlog.get_logger(__name__)


class TextPublisher:
    """The engine's `on_delta` for one attempt: a piece goes out at once, or with those that follow it shortly. It stops
    for good when the server does not answer or the attempt is void; the whole text comes with the result in any
    case."""

    def __init__(self, ledger: Ledger, task_id: str, attempt: int, token: str) -> None:
        self._ledger, self._task_id, self._attempt, self._token = ledger, task_id, attempt, token
        self._pending: list[Delta] = []
        self._next_at, self._said = float("-inf"), 0
        self._stopped = False

    def __call__(self, piece: Delta) -> None:
        now = time.monotonic()
        self._pending.append(piece)
        if self._stopped or now < self._next_at:
            return
        pieces, self._pending = joined(self._pending), []
        self._said += 1
        try:
            self._stopped = self._ledger.say(self._task_id, self._attempt, self._token, pieces) != "ok"
        except Unreachable as error:
            log.warning("text_unpublished", task_id=self._task_id, reason=str(error))
            self._stopped = True
        done = time.monotonic()
        self._next_at = done + max(min(PAUSES * (done - now), MAX_PAUSE), self._said * SAY_TIME)


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The same, with those of an answer that go on with the same text, thought or call made one. The order of pieces of
    different answers says nothing."""
    out: list[Delta] = []
    latest: dict[int, int] = {}  # answer → where its last piece is
    for delta in deltas:
        at = latest.get(delta.index)
        if at is not None and delta.name is None and _what(out[at]) == _what(delta):
            last = out[at]
            together = {name: getattr(last, name) + getattr(delta, name) for name in ("text", "reasoning", "arguments")}
            out[at] = last.model_copy(update=together)
        else:
            latest[delta.index] = len(out)
            out.append(delta)
    return out


def _what(delta: Delta) -> tuple[int | None, bool]:
    return delta.call, bool(delta.text)
