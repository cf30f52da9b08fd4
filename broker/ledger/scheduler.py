"""The ledger as the scheduler uses it: lead, follow what happens, decide, mend."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from perllm.broker.connection import of_a_record, reaching
from perllm.broker.ledger.base import LedgerBase, readable
from perllm.broker.ledger.events import START, Mark, event_of, in_order
from perllm.broker.ledger.records import PLACEMENT_FIELDS, Dispatch, End, Placement, Ruling, placement_of
from perllm.broker.ledger.script import Call, call
from perllm.broker.logs import LazyLogger
from perllm.broker.messages import Event, Explanation, NodeBelief

#: Seconds a dispatched task may wait in its node's queue behind others. That its node takes up nothing though it has a
#: slot for it is for the scheduler to see, and to `take_back`.
DISPATCH_LEASE = 30.0

#: Things of each kind mended per call of `sweep`: bounds how long one call holds the server.
SWEEP_LIMIT = 500

log = LazyLogger(__name__)


class Scheduler(LedgerBase):
    """See Ledger."""

    def lead(self, holder: str, ttl: float) -> int | None:
        """Become or stay leader for `ttl` s. Returns the epoch to dispatch under, None while another leads. `holder` is
        the same text as long as it leads: a `Leader.dump()`, so that others see who it is."""
        reply = self._call("lead", holder=holder, ttl=ttl)
        return int(reply) if reply else None

    def resign(self, holder: str) -> None:
        """Stop leading, so a standby takes over at once."""
        self._call("resign", holder=holder)

    def dispatch(self, epoch: int, dispatches: Sequence[Dispatch]) -> list[Ruling]:
        """Send pending tasks to their nodes' queues: state, event and message are one call each, all one round trip."""
        return self._rulings(
            call(
                "dispatch",
                epoch=epoch,
                id=d.id,
                attempt=d.attempt,
                node=d.node,
                boot=d.boot,
                model=d.model,
                queue=d.queue,
                message=d.message,
                why=_json(d.why),
                lease=DISPATCH_LEASE,
            )
            for d in dispatches
        )

    def end(self, epoch: int, ends: Sequence[End]) -> list[Ruling]:
        """Reject or expire pending tasks, in one round trip."""
        return self._rulings(
            call("end", epoch=epoch, id=e.id, state=e.state, reason=e.why.sentence, why=_json(e.why)) for e in ends
        )

    def take_back(self, epoch: int, placed: Sequence[tuple[str, int]], reason: str) -> list[Ruling]:
        """Have dispatched tasks (id, attempt) that their node does not take up pending again, in one round trip."""
        return self._rulings(call("take_back", epoch=epoch, id=i, attempt=n, reason=reason) for i, n in placed)

    def distrust(self, epoch: int, node: str, boot: str, reason: str) -> None:
        """Note why a node is sent little, for people and the next leader; an empty reason: it is no more."""
        self._call("distrust", epoch=epoch, name=node, boot=boot, reason=reason)

    def _rulings(self, calls: Iterable[Call]) -> list[Ruling]:
        """One that fails on its task's record is refused, and the sweep ends the task in time."""
        with reaching(self.settings):
            return [self._ruling(reply) for reply in self._script.pipeline(list(calls))]

    @staticmethod
    def _ruling(reply: Any) -> Ruling:
        if isinstance(reply, Exception):
            if not of_a_record(reply):
                raise reply
            log.error("record_unusable", reason=str(reply))
            return "refused"
        return cast(Ruling, reply.decode())

    def sweep(self) -> int:
        """Mend what time has broken: lapsed leases, passed deadlines, silent nodes; forget old finished tasks. Returns
        how many; a full sweep is done when it is less than SWEEP_LIMIT. Where no scheduler leads, workers do it."""
        return int(
            self._call(
                "sweep",
                limit=SWEEP_LIMIT,
                max_strikes=self.settings.max_strikes,
                max_kept=self.settings.retention_tasks,
            )
        )

    def announce(self) -> None:
        """Tell the nodes and Celery producers of tasks that their producers ended. The sweep does so too; this is
        sooner."""
        self._call("announce", limit=SWEEP_LIMIT)

    def save_snapshot(
        self,
        epoch: int,
        state: dict[str, Any],
        *,
        metrics: dict[str, Any] | None = None,
        learned: Mapping[str, NodeBelief] | None = None,
    ) -> bool:
        """Keep the scheduler's learned state, the sums it keeps (`Query.metrics`) and, for everybody, what it believes
        of the nodes (`Query.learned`), in one call; what is None stays as it was. False when this epoch no longer
        leads."""
        beliefs = None if learned is None else {name: belief.model_dump() for name, belief in learned.items()}
        texts = {"state": state, "metrics": metrics, "learned": beliefs}
        said = self._call(
            "snapshot", epoch=epoch, **{name: "" if data is None else json.dumps(data) for name, data in texts.items()}
        )
        return bool(said == b"ok")

    def load_snapshot(self) -> dict[str, Any] | None:
        """The state last saved, or None."""
        with reaching(self.settings):
            raw = cast("bytes | None", self._client.get(f"{self._prefix}snapshot"))
        return cast("dict[str, Any]", json.loads(raw)) if raw else None

    def events(self, after: str, *, count: int = 1000, block: float | None = None) -> list[tuple[str, Event]]:
        """Some events later than the position `after` in the order they happened, `count` of each of the streams at
        most, waiting up to `block` s for one. An entry that is no event, or not its writers' to tell, is logged and
        skipped."""
        wait = None if block is None else max(1, int(block * 1000))
        mark = Mark.of(after)
        while True:
            places: dict[Any, Any] = {f"{self._prefix}requests": mark.requests, f"{self._prefix}events": mark.events}
            with reaching(self.settings):
                reply = cast("list[Any] | None", self._client.xread(places, count=count, block=wait))
            if not reply:
                return []
            events = []
            for stream, position, fields in in_order(reply, count):
                mark = mark._replace(**{stream: position})
                if (event := event_of(stream, position, fields)) is not None:
                    events.append((str(mark), event))
            if events:
                return events  # otherwise none of these is readable; what follows may be

    def first_and_last_event(self) -> tuple[str, str]:
        """Positions of the oldest events kept and the newest."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for stream in Mark._fields:
                pipe.xrange(f"{self._prefix}{stream}", count=1)
                pipe.xrevrange(f"{self._prefix}{stream}", count=1)
            ends = [rows[0][0].decode() if rows else START for rows in pipe.execute()]
        return str(Mark(*ends[::2])), str(Mark(*ends[1::2]))

    def features(self, task_ids: Sequence[str]) -> list[Placement | None]:
        """What the scheduler needs to know of tasks, as events it would have read, in order; None for unknown ids, for
        tasks that their producers ended, and for those of which it cannot be read."""
        with reaching(self.settings):
            pipe = self._client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hmget(f"{self._prefix}task:{task_id}", "state", "withdrawn", *PLACEMENT_FIELDS)
            rows = list(readable(pipe.execute(raise_on_error=False)))
        return [
            placement_of(i, row[2:]) if row and row[0] and not row[1] and row[2] else None
            for i, row in zip(task_ids, rows, strict=True)
        ]

    def incarnation(self) -> str:
        """Another after every start of the server. One that ended by force may have forgotten its last second, so
        whatever was read from the one before need not be true any more."""
        with reaching(self.settings):
            return str(self._client.info("server")["run_id"])


def _json(why: Explanation) -> str:
    return why.model_dump_json(exclude_defaults=True)
