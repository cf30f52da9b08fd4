"""What the inbox does as tasks end, beside its worker: sends what is to follow them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial

import redis
import structlog
from pydantic import ValidationError

from perllm.broker.errors import Unreachable
from perllm.broker.inbox.events import Events
from perllm.broker.inbox.followers import Followers
from perllm.broker.inbox.sender import Sender, Unsendable
from perllm.broker.ledger import EndKind, Ledger
from perllm.broker.messages import Result, State

#: Tasks whose followers are sent in one round, and s after which those of a process that died meanwhile are sent by
#: another.
ROUND, AGAIN = 20, 30.0
#: Seconds between looks, should an announcement be lost, and after the server could not be reached, at random.
LOOK_EVERY, PAUSE = 0.5, (0.2, 1.0)

_KINDS: dict[State, EndKind] = {
    State.FAILED: "failed",
    State.EXPIRED: "expired",
    State.REJECTED: "rejected",
    State.CANCELLED: "revoked",
}

log = structlog.get_logger(__name__)


class Following:
    """A thread that sends what the ledger says is to follow, and tells Flower of ends that no worker saw. Several
    processes may have one."""

    def __init__(self, ledger: Ledger, sender: Sender, events: Events) -> None:
        self._ledger, self._sender, self._events = ledger, sender, events
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="perllm-following", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop, when what is being sent is sent or cannot be."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with self._ledger.signals("@inbox") as signals:
                    while not self._closing.is_set():
                        if self.round() < ROUND:
                            self._await_more(signals)
            except (Unreachable, redis.exceptions.RedisError) as error:
                log.warning("following_delayed", reason=str(error))
                self._closing.wait(random.uniform(*PAUSE))
            except Exception:  # a bug must not end the thread
                log.exception("following_failed")
                self._closing.wait(LOOK_EVERY)

    def _await_more(self, signals: redis.client.PubSub) -> None:
        if signals.get_message(timeout=LOOK_EVERY) is not None:
            while signals.get_message() is not None:  # one look serves all that have been announced
                pass

    def round(self) -> int:
        """Send what follows some of the tasks that have ended; returns how many. Raises Unreachable."""
        told = self._ledger.follow(ROUND, AGAIN)
        results = self._ledger.results([task_id for task_id, _ in told])
        for (task_id, written), result in zip(told, results, strict=True):
            self._until_sent(partial(self._send, task_id, written, result))
            if self._closing.is_set():
                break
        return len(told)

    def _until_sent(self, send: Callable[[], None]) -> None:
        while not self._closing.is_set():
            try:
                send()
                return
            except Unreachable as error:
                log.warning("following_delayed", reason=str(error))
                self._closing.wait(random.uniform(*PAUSE))

    def _send(self, task_id: str, written: str, result: Result | None) -> None:
        if result is not None and result.state is not State.SUCCEEDED and result.queued is None:
            self._events.ended(task_id, _KINDS[result.state], result.reason or str(result.state))
        if written:
            self._send_followers(task_id, written, result)
        self._ledger.followed([task_id])

    def _send_followers(self, task_id: str, written: str, result: Result | None) -> None:
        try:
            followers = Followers.model_validate_json(written)
        except ValidationError:
            log.warning("followers_unreadable", task_id=task_id)
        else:
            try:
                if result is not None and result.state is State.SUCCEEDED:
                    self._sender.succeeded(task_id, followers, result.model_dump(mode="json", exclude_unset=True))
                elif result is not None:
                    self._sender.failed(task_id, followers, _KINDS[result.state], result.reason or str(result.state))
                else:
                    self._sender.failed(task_id, followers, "revoked", f"task {task_id} was forgotten")
            except Unsendable as error:
                log.warning("followers_unsendable", task_id=task_id, reason=str(error))
                self._sender.refuse(followers, f"it could not be sent after {task_id}: {error}")
