"""The ledger as workers use it: put a node in service, take up its tasks and end them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import redis

from perllm.broker.ledger.base import LedgerBase
from perllm.broker.ledger.records import Claim, Verdict
from perllm.broker.ledger.script import Argument
from perllm.broker.messages import Heartbeat, NodeInfo, Output, Receipt

#: Pieces of a streamed task's text that are kept; a worker adds at most one every `SAY_EVERY` s.
TEXT_PIECES = 20_000
SAY_EVERY = 0.05


class Worker(LedgerBase):
    """See Ledger."""

    def register(self, info: NodeInfo) -> float | None:
        """Put a node in service. None when done, or the seconds until a live namesake's registration could lapse."""
        s = self.settings
        reply = self._call(
            "register", info.name, info.boot, info.model_dump_json(), info.queue, self._node_ttl, s.max_strikes
        )
        return None if reply == b"ok" else float(reply)

    def beat(self, heartbeat: Heartbeat, running: Iterable[tuple[str, int, str]]) -> list[str] | None:
        """A heartbeat and the renewal of every running attempt's lease (id, attempt, token), in one call. Returns the
        ids that must stop (cancelled, or no longer this worker's), or None when the node must register again."""
        beat = heartbeat.model_dump_json(exclude={"at"})
        words = [w for attempt in running for w in attempt]
        reply = self._call("beat", heartbeat.node, heartbeat.boot, beat, self._node_ttl, self.settings.lease, *words)
        return None if reply[0] == b"unknown" else [i.decode() for i in reply[1:]]

    @property
    def _node_ttl(self) -> float:
        """Seconds after which a silent node counts as lost: as long as a task's lease."""
        return max(self.settings.lease, 2.5 * self.settings.heartbeat)

    def claim(self, task_id: str, attempt: int, node: str, token: str) -> Claim | None:
        """Start an attempt under a token of the caller's choice. None when the attempt is void (drop the message).
        Repeating a claim with its token gives the same answer."""
        reply = self._call("claim", task_id, attempt, node, token, self.settings.lease)
        return Claim(reply[0], float(reply[1]), reply[2].decode()) if reply else None

    def complete(
        self,
        task_id: str,
        attempt: int,
        token: str,
        state: Literal["succeeded", "expired"],
        output: Output,
        receipt: Receipt,
        reason: str = "",
    ) -> Verdict:
        """Store the result: the first completion wins, repeating it is harmless, a void attempt changes nothing."""
        return self._verdict(
            "complete",
            task_id,
            attempt,
            token,
            state,
            output.model_dump_json(exclude_none=True),
            receipt.model_dump_json(exclude_defaults=True),
            reason,
        )

    def fail(self, task_id: str, attempt: int, token: str, reason: str, *, retry: bool) -> Verdict:
        """End an attempt by an error: pending again with a strike if `retry` and strikes are left, else failed."""
        return self._verdict("fail", task_id, attempt, token, reason, int(retry), self.settings.max_strikes)

    def say(self, task_id: str, attempt: int, token: str, text: str) -> Verdict:
        """Publish a piece of a running attempt's text."""
        return self._verdict("say", task_id, attempt, token, text, TEXT_PIECES)

    def hand_back(self, task_id: str, attempt: int, token: str, reason: str) -> Verdict:
        """Give up running work without fault: pending again, no strike."""
        return self._verdict("hand_back", task_id, attempt, token, reason)

    def drain(self, node: str, boot: str, reason: str) -> None:
        """Take a node out of service: no new work, what waits there unclaimed is pending again at once."""
        self._call("drain", node, boot, reason)

    def leave(self, node: str, boot: str, reason: str) -> None:
        """Forget a node; whatever it still holds is pending again."""
        self._call("leave", node, boot, reason)

    def signals(self, node: str) -> redis.client.PubSub:
        """A subscription to the node's signal channel: a message means a task there must stop. To be closed."""
        subscription: redis.client.PubSub = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        subscription.subscribe(f"{self._prefix}signal:{node}")
        return subscription

    def _verdict(self, *words: Argument) -> Verdict:
        return cast(Verdict, self._call(*cast("tuple[str, ...]", words)).decode())
