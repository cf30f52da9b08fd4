"""The ledger as workers use it: put a node in service, take up its tasks and end them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, cast

import redis

from perllm.broker.ledger.base import LedgerBase
from perllm.broker.ledger.records import Claim, Verdict
from perllm.broker.ledger.script import Argument
from perllm.broker.messages import DELTAS, Delta, Heartbeat, NodeInfo, Output, Receipt

#: Pieces of a streamed task's answer that are kept. A worker adds one for each `SAY_TIME` s, times those there are: at
#: first ten thousand a second, at last ten, so that they are enough for a quarter of an hour.
TEXT_PIECES, SAY_TIME = 20_000, 5e-6


class Worker(LedgerBase):
    """See Ledger."""

    def register(self, info: NodeInfo) -> float | None:
        """Put a node in service. None when done, or the seconds until a live namesake's registration could lapse."""
        reply = self._call(
            "register",
            name=info.name,
            boot=info.boot,
            info=info.model_dump_json(),
            queue=info.queue,
            ttl=self._node_ttl,
            max_strikes=self.settings.max_strikes,
        )
        return None if reply == b"ok" else float(reply)

    def beat(self, heartbeat: Heartbeat, running: Iterable[tuple[str, int, str]]) -> list[str] | None:
        """A heartbeat and the renewal of every running attempt's lease (id, attempt, token), in one call; producers who
        asked for it are shown the heartbeat's progress of their task. Returns the
        ids that must stop (cancelled, or no longer this worker's), or None when the node must register again."""
        beat = heartbeat.model_dump_json(exclude={"at"})
        reply = self._call(
            "beat",
            [word for attempt in running for word in (*attempt, heartbeat.progress.get(attempt[0], 0))],
            name=heartbeat.node,
            boot=heartbeat.boot,
            beat=beat,
            ttl=self._node_ttl,
            lease=self.settings.lease,
        )
        return None if reply[0] == b"unknown" else [i.decode() for i in reply[1:]]

    @property
    def _node_ttl(self) -> float:
        """Seconds after which a silent node counts as lost: as long as a task's lease."""
        return max(self.settings.lease, 2.5 * self.settings.heartbeat)

    def claim(self, task_id: str, attempt: int, node: str, token: str) -> Claim | None:
        """Start an attempt under a token of the caller's choice. None when the attempt is void (drop the message).
        Repeating a claim with its token gives the same answer."""
        reply = self._call("claim", id=task_id, attempt=attempt, node=node, token=token, lease=self.settings.lease)
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
            id=task_id,
            attempt=attempt,
            token=token,
            state=state,
            output=output.model_dump_json(exclude_none=True),
            receipt=receipt.model_dump_json(exclude_defaults=True),
            reason=reason,
        )

    def fail(self, task_id: str, attempt: int, token: str, reason: str, *, retry: bool) -> Verdict:
        """End an attempt by an error: pending again with a strike if `retry` and strikes are left, else failed."""
        return self._verdict(
            "fail",
            id=task_id,
            attempt=attempt,
            token=token,
            reason=reason,
            retry=int(retry),
            max_strikes=self.settings.max_strikes,
        )

    def say(self, task_id: str, attempt: int, token: str, deltas: Sequence[Delta]) -> Verdict:
        """Publish pieces of a running attempt's answer."""
        text = DELTAS.dump_json(list(deltas), exclude_defaults=True)
        return self._verdict("say", id=task_id, attempt=attempt, token=token, text=text, most=TEXT_PIECES)

    def hand_back(self, task_id: str, attempt: int, token: str, reason: str) -> Verdict:
        """Give up running work without fault: pending again, no strike."""
        return self._verdict("hand_back", id=task_id, attempt=attempt, token=token, reason=reason)

    def drain(self, node: str, boot: str, reason: str) -> None:
        """Take a node out of service: no new work, what waits there unclaimed is pending again at once."""
        self._call("drain", name=node, boot=boot, reason=reason)

    def leave(self, node: str, boot: str, reason: str) -> None:
        """Forget a node; whatever it still holds is pending again."""
        self._call("leave", name=node, boot=boot, reason=reason)

    def signals(self, node: str) -> redis.client.PubSub:
        """A subscription to the node's signal channel: a message means a task there must stop. To be closed."""
        subscription: redis.client.PubSub = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        subscription.subscribe(f"{self._prefix}signal:{node}")
        return subscription

    def _verdict(self, operation: str, **arguments: Argument) -> Verdict:
        return cast(Verdict, self._call(operation, **arguments).decode())
