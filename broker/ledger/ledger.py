"""The ledger's Python face: one method per operation of `ledger.lua`, typed. Times in s, the server's clock."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, Self, cast

import redis
import structlog
from pydantic import ValidationError

from broker.connection import REPLY_TIMEOUT, connect, reaching
from broker.errors import field_errors
from broker.ledger.script import Argument, Script
from broker.messages import (
    BYTES_PER_TOKEN,
    Claimed,
    Dispatched,
    Ended,
    Event,
    Explanation,
    Heartbeat,
    NodeInfo,
    Output,
    Receipt,
    Result,
    State,
    Submitted,
    TaskSpec,
    parse_event,
)
from broker.settings import Settings

#: Seconds after which a dispatched task that is not claimed is looked at, and taken back (its old message is void then)
#: where its node has a slot for it; behind others that run it may wait for so long in all.
UNCLAIMED = 10.0
DISPATCH_LEASE = 30.0
#: Seconds a node that takes up nothing is sent nothing: the first time, and at most, twice as long each time.
RESTS = (15.0, 300.0)
#: Tasks and bytes of payload per call of `submit`: bounds how long one call holds the server.
SUBMIT_TASKS = 100
SUBMIT_BYTES = 1 << 20
#: Calls of `submit` on their way at once: few enough for the socket's buffer, so that the client goes on meanwhile.
SUBMIT_CALLS = 3
#: Pieces of a streamed task's text that are kept; a worker adds at most one every `SAY_EVERY` s.
TEXT_PIECES = 20_000
SAY_EVERY = 0.05
#: Ids revoked before they were submitted that are kept, and s for which each is.
REVOKED, REVOKED_FOR = 50_000, 86_400.0
#: Things of each kind mended per call of `sweep`, for the same reason.
SWEEP_LIMIT = 500

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}")

#: A stream's beginning.
START = "0-0"

Verdict = Literal["ok", "void"]
Ruling = Literal["ok", "refused", "not_leader", "node_gone"]

log = structlog.get_logger(__name__)


class Mark(NamedTuple):
    """A place in the event stream: the last entries read of the two it is kept in, see `ledger.lua`."""

    events: str = START
    requests: str = START

    @classmethod
    def of(cls, position: str) -> Self:
        """From its text; that of an older version knows one stream only."""
        events, _, requests = position.partition(",")
        return cls(events, requests or START)

    def __str__(self) -> str:
        return f"{self.events},{self.requests}"


class Dispatch(NamedTuple):
    """One task on its way to a node's queue. `message` is the Celery message as it rests in Redis."""

    id: str
    attempt: int
    node: str
    boot: str
    model: str
    queue: str
    message: str
    why: Explanation


class End(NamedTuple):
    """A final decision of the scheduler about a pending task."""

    id: str
    state: Literal["rejected", "expired"]
    why: Explanation


class Claim(NamedTuple):
    """What a worker gets for a claimed attempt. `deadline` is in s from now."""

    payload: bytes
    deadline: float
    model: str


class Placement(NamedTuple):
    """Where an unfinished task is: its submission and, if it is on a node, the events that put it there."""

    submitted: Submitted
    dispatched: Dispatched | None
    claimed: Claimed | None


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as the ledger holds it now."""

    id: str
    state: State
    spec: TaskSpec
    submitted: float
    deadline: float
    attempt: int
    strikes: int
    node: str | None
    model: str | None
    why: Explanation | None
    result: Result | None


class Ledger:
    """Every operation on tasks and nodes, each one atomic call. Thread-safe.

    Raises broker.errors.Unreachable when the server cannot be used; nothing is half-done then, and any call may be
    repeated. `reply_timeout` is how long the server may be silent, s.
    """

    def __init__(self, settings: Settings, *, reply_timeout: float = REPLY_TIMEOUT) -> None:
        self._settings = settings
        self.prefix = f"{{{settings.cell}}}:"
        self.client = connect(settings, reply_timeout=reply_timeout)
        self._script = Script(self.client, self.prefix, (settings.stream_length, settings.retention))

    def _call(self, operation: str, *arguments: Argument) -> Any:
        with reaching(self._settings):
            return self._script.call(operation, *arguments)

    def _pipeline(self, calls: Sequence[tuple[Argument, ...]]) -> list[Any]:
        with reaching(self._settings):
            replies = self._script.pipeline(calls)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

    # --- producers

    def submit(self, tasks: Iterable[tuple[str, TaskSpec]]) -> list[str]:
        """Store tasks as pending, each under its id. Returns the id in force for each, in order: its own, or that of
        the first task submitted with the same tenant and idempotency key. An id that exists is left as it is.

        Sent in pipelined pieces, so `tasks` may be a long iterator. If this raises, a beginning of them may have been
        stored; submitting the same ids again is harmless.
        """
        calls = self._submissions(tasks)
        pieces = iter(lambda: list(islice(calls, SUBMIT_CALLS)), [])
        with reaching(self._settings):
            return [task_id for replies in self._script.stream(pieces) for task_id in _ids(replies)]

    @staticmethod
    def _submissions(tasks: Iterable[tuple[str, TaskSpec]]) -> Iterator[tuple[Argument, ...]]:
        call: list[Argument] = ["submit"]
        size = 0
        for task_id, spec in tasks:
            payload = spec.model_dump_json(exclude_defaults=True)
            # A tenant's name holds no space, so two tenants' keys are never the same.
            key = f"{spec.tenant} {spec.idempotency_key}" if spec.idempotency_key else ""
            call += (task_id, payload, _features(spec, len(payload)), spec.deadline, key, spec.tenant)
            size += len(payload)
            if len(call) > 6 * SUBMIT_TASKS or size > SUBMIT_BYTES:
                yield tuple(call)
                call, size = ["submit"], 0
        if len(call) > 1:
            yield tuple(call)

    def cancel(self, task_id: str) -> State | None:
        """End a task as cancelled. Returns the state it was found in (a final one stays as it is), None if unknown."""
        reply = self._call("cancel", task_id)
        return State(reply.decode()) if reply else None

    def forget(self, task_id: str) -> bool:
        """Drop a task and all that is kept of it, its prompt, text and result; it is cancelled first if it goes on.
        False if there is none."""
        return self._call("forget", task_id) is not None

    def cancel_many(self, task_ids: Sequence[str]) -> list[State | None]:
        """`cancel` for many, in one round trip."""
        return [State(r.decode()) if r else None for r in self._pipeline([("cancel", i) for i in task_ids])]

    def revoke(self, task_ids: Sequence[str]) -> list[State | None]:
        """`cancel` for Celery's producers, whose message may still be on its way: an id that is not known (None) is
        cancelled as soon as it is submitted."""
        calls: list[tuple[Argument, ...]] = [
            ("revoke", REVOKED_FOR, REVOKED, *task_ids[start : start + SUBMIT_TASKS])
            for start in range(0, len(task_ids), SUBMIT_TASKS)
        ]
        return [State(was.decode()) if was else None for reply in self._pipeline(calls) for was in reply]

    def refuse(self, task_id: str, status: Literal["FAILURE", "REVOKED"], reason: str) -> None:
        """Have the Celery producer of a message told that it becomes no task. Where a task has the id, nothing comes of
        it."""
        self._call("refuse", *(word.encode("utf-8", "replace") for word in (task_id, status, reason)))

    def task(self, task_id: str) -> TaskRecord | None:
        """Everything known of a task, or None."""
        with reaching(self._settings):
            pipe = self.client.pipeline()
            pipe.hgetall(f"{self.prefix}task:{task_id}")
            pipe.get(f"{self.prefix}result:{task_id}")
            raw, result = pipe.execute()
        return _record(task_id, raw, result) if raw else None

    def results(self, task_ids: Sequence[str]) -> list[Result | None]:
        """The results of those that are final, None for the others and the unknown, in order."""
        if not task_ids:
            return []
        with reaching(self._settings):
            kept = cast("list[bytes | None]", self.client.mget([f"{self.prefix}result:{i}" for i in task_ids]))
            others = [i for i, raw in zip(task_ids, kept, strict=True) if raw is None]
            pipe = self.client.pipeline(transaction=False)
            for task_id in others:
                pipe.hmget(f"{self.prefix}task:{task_id}", *_ENDING)
            endings = dict(zip(others, pipe.execute(), strict=True))
        return [_result(i, raw, endings.get(i, ())) for i, raw in zip(task_ids, kept, strict=True)]

    def states(self, task_ids: Sequence[str]) -> list[State | None]:
        """Where these tasks are, None for the unknown, in order."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hget(f"{self.prefix}task:{task_id}", "state")
            return [State(raw.decode()) if raw else None for raw in pipe.execute()]

    def tenants(self, task_ids: Sequence[str]) -> list[str | None]:
        """Whose these tasks are, None for the unknown, in order."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hget(f"{self.prefix}task:{task_id}", "tenant")
            return [raw.decode() if raw else None for raw in pipe.execute()]

    def tasks_of(self, tenant: str, *, after: str | None, limit: int, newest: bool = True) -> list[str]:
        """Up to `limit` ids of a tenant's tasks by the time of their submission, those that follow the task `after`."""
        key = f"{self.prefix}of:{tenant}"
        with reaching(self._settings):
            start = 0
            if after is not None:
                rank = self.client.zrevrank(key, after) if newest else self.client.zrank(key, after)
                if rank is None:
                    return []
                start = cast(int, rank) + 1
            raw = self.client.zrange(key, start, start + limit - 1, desc=newest)
        return [i.decode() for i in cast("list[bytes]", raw)]

    def text(self, task_id: str, start: int = 0) -> list[tuple[int, str]]:
        """The pieces of a streamed task's text from number `start` on, each with the attempt that generated it."""
        with reaching(self._settings):
            raw = cast("list[bytes]", self.client.lrange(f"{self.prefix}text:{task_id}", start, -1))
        pairs = (piece.decode().split(" ", 1) for piece in raw)
        return [(int(attempt), text) for attempt, text in pairs]

    def said(self, task_id: str) -> str:
        """The channel on which new pieces of its text are announced."""
        return f"{self.prefix}said:{task_id}"

    def known(self, task_ids: Sequence[str]) -> list[bool]:
        """Which of these tasks the ledger holds, in order."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.exists(f"{self.prefix}task:{task_id}")
            return [bool(n) for n in pipe.execute()]

    def counts(self) -> dict[State, int]:
        """How many tasks are in each state."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for state in State:
                pipe.zcard(f"{self.prefix}in:{state}")
            return dict(zip(State, pipe.execute(), strict=True))

    def totals(self) -> dict[str, int]:
        """How many tasks were ever submitted, ended in each final state, and forgotten since."""
        with reaching(self._settings):
            raw = cast("dict[bytes, bytes]", self.client.hgetall(f"{self.prefix}totals"))
        return {k.decode(): int(v) for k, v in raw.items()}

    def ids(self, state: State, *, start: int = 0, limit: int = -1, newest: bool = False) -> list[str]:
        """Ids of tasks in a state: pending by deadline, placed by lease, final by when they ended."""
        stop = -1 if limit < 0 else start + limit - 1
        with reaching(self._settings):
            raw = self.client.zrange(f"{self.prefix}in:{state}", start, stop, desc=newest)
        return [i.decode() for i in cast("list[bytes]", raw)]

    def led(self) -> bool:
        """Whether a scheduler leads."""
        with reaching(self._settings):
            return bool(self.client.exists(f"{self.prefix}leader"))

    # --- scheduler

    def lead(self, holder: str, ttl: float) -> int | None:
        """Become or stay leader for `ttl` s. Returns the epoch to dispatch under, None while another leads."""
        reply = self._call("lead", holder, ttl)
        return int(reply) if reply else None

    def resign(self, holder: str) -> None:
        """Stop leading, so a standby takes over at once."""
        self._call("resign", holder)

    def dispatch(self, epoch: int, dispatches: Sequence[Dispatch]) -> list[Ruling]:
        """Send pending tasks to their nodes' queues: state, event and message are one call each, all one round trip."""
        return self._rulings(
            ("dispatch", epoch, *d[:7], d.why.model_dump_json(exclude_defaults=True), UNCLAIMED) for d in dispatches
        )

    def end(self, epoch: int, ends: Sequence[End]) -> list[Ruling]:
        """Reject or expire pending tasks, in one round trip."""
        return self._rulings(
            ("end", epoch, e.id, e.state, e.why.sentence, e.why.model_dump_json(exclude_defaults=True)) for e in ends
        )

    def _rulings(self, calls: Iterable[tuple[Argument, ...]]) -> list[Ruling]:
        return [cast(Ruling, cast(bytes, r).decode()) for r in self._pipeline(list(calls))]

    def sweep(self) -> int:
        """Mend what time has broken: lapsed leases, passed deadlines, silent nodes; forget old finished tasks. Returns
        how many; a full sweep is done when it is less than SWEEP_LIMIT."""
        s = self._settings
        limits = (SWEEP_LIMIT, s.max_strikes, s.retention_tasks)
        return int(self._call("sweep", *limits, UNCLAIMED, DISPATCH_LEASE, *RESTS))

    def save_snapshot(self, epoch: int, state: dict[str, Any]) -> bool:
        """Keep the scheduler's learned state; False when this epoch no longer leads."""
        return bool(self._call("snapshot", epoch, json.dumps(state)) == b"ok")

    def announce(self) -> None:
        """Tell cancelled tasks' nodes and Celery producers. The sweep does so too; this is sooner."""
        self._call("announce", SWEEP_LIMIT)

    def load_snapshot(self) -> dict[str, Any] | None:
        """The state last saved, or None."""
        with reaching(self._settings):
            raw = cast("bytes | None", self.client.get(f"{self.prefix}snapshot"))
        return cast("dict[str, Any]", json.loads(raw)) if raw else None

    def events(self, after: str, *, count: int = 1000, block: float | None = None) -> list[tuple[str, Event]]:
        """Some events later than the position `after` in the order they happened, `count` of each of the streams at
        most, waiting up to `block` s for one. An entry that is no event, or not its writers' to tell, is logged and
        skipped."""
        wait = None if block is None else max(1, int(block * 1000))
        mark = Mark.of(after)
        while True:
            places: dict[Any, Any] = {f"{self.prefix}requests": mark.requests, f"{self.prefix}events": mark.events}
            with reaching(self._settings):
                reply = cast("list[Any] | None", self.client.xread(places, count=count, block=wait))
            if not reply:
                return []
            events = []
            for stream, position, fields in in_order(reply, count):
                mark = mark._replace(**{stream: position})
                if (event := _event(stream, position, fields)) is not None:
                    events.append((str(mark), event))
            if events:
                return events  # otherwise none of these is readable; what follows may be

    def first_and_last_event(self) -> tuple[str, str]:
        """Positions of the oldest events kept and the newest."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for stream in Mark._fields:
                pipe.xrange(f"{self.prefix}{stream}", count=1)
                pipe.xrevrange(f"{self.prefix}{stream}", count=1)
            ends = [rows[0][0].decode() if rows else START for rows in pipe.execute()]
        return str(Mark(*ends[::2])), str(Mark(*ends[1::2]))

    def unfinished(self) -> Iterator[tuple[State, str]]:
        """Every pending, dispatched and running task's id."""
        for state in (State.RUNNING, State.DISPATCHED, State.PENDING):
            for task_id in self.ids(state):
                yield state, task_id

    def features(self, task_ids: Sequence[str]) -> list[Placement | None]:
        """What the scheduler needs to know of tasks, as events it would have read, in order; None for unknown
        ids and cancelled tasks."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hmget(f"{self.prefix}task:{task_id}", "state", *_PLACEMENT_FIELDS)
            rows = pipe.execute()
        gone = (None, b"cancelled")
        return [None if row[0] in gone else _placement(i, row[1:]) for i, row in zip(task_ids, rows, strict=True)]

    def now(self) -> float:
        """The server's clock."""
        with reaching(self._settings):
            seconds, micros = self.client.time()
        return seconds + micros / 1e6

    def incarnation(self) -> str:
        """Another after every start of the server. One that ended by force may have forgotten its last second, so
        whatever was read from the one before need not be true any more."""
        with reaching(self._settings):
            return str(self.client.info("server")["run_id"])

    # --- workers

    def register(self, info: NodeInfo) -> float | None:
        """Put a node in service. None when done, or the seconds until a live namesake's registration could lapse."""
        s = self._settings
        reply = self._call(
            "register", info.name, info.boot, info.model_dump_json(), info.queue, self._node_ttl, s.max_strikes
        )
        return None if reply == b"ok" else float(reply)

    def beat(self, heartbeat: Heartbeat, running: Iterable[tuple[str, int, str]]) -> list[str] | None:
        """A heartbeat and the renewal of every running attempt's lease (id, attempt, token), in one call. Returns the
        ids that must stop (cancelled, or no longer this worker's), or None when the node must register again."""
        beat = heartbeat.model_dump_json(exclude={"at"})
        words = [w for attempt in running for w in attempt]
        reply = self._call("beat", heartbeat.node, heartbeat.boot, beat, self._node_ttl, self._settings.lease, *words)
        return None if reply[0] == b"unknown" else [i.decode() for i in reply[1:]]

    @property
    def _node_ttl(self) -> float:
        """Seconds after which a silent node counts as lost: as long as a task's lease."""
        return max(self._settings.lease, 2.5 * self._settings.heartbeat)

    def claim(self, task_id: str, attempt: int, node: str, token: str) -> Claim | None:
        """Start an attempt under a token of the caller's choice. None when the attempt is void (drop the message).
        Repeating a claim with its token gives the same answer."""
        reply = self._call("claim", task_id, attempt, node, token, self._settings.lease)
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
        return self._verdict("fail", task_id, attempt, token, reason, int(retry), self._settings.max_strikes)

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
        subscription: redis.client.PubSub = self.client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        subscription.subscribe(f"{self.prefix}signal:{node}")
        return subscription

    def _verdict(self, *words: Argument) -> Verdict:
        return cast(Verdict, self._call(*cast("tuple[str, ...]", words)).decode())

    # --- nodes, for everybody

    def nodes(self) -> list[tuple[NodeInfo, Heartbeat | None, bool]]:
        """Every live node: its registration, its last heartbeat if any, and whether it is draining."""
        with reaching(self._settings):
            names = cast("list[bytes]", self.client.zrange(f"{self.prefix}nodes", 0, -1))
            pipe = self.client.pipeline(transaction=False)
            for name in names:
                pipe.hmget(f"{self.prefix}node:".encode() + name, "info", "beat", "draining")
            rows = pipe.execute()
        return [node for row in rows if (node := _node(row)) is not None]


def is_id(task_id: str) -> bool:
    """Whether this can be a task's id: ids are the producers' own, and become parts of keys and messages."""
    return _ID.fullmatch(task_id) is not None


def _ids(replies: list[Any]) -> list[str]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [task_id.decode() for reply in replies for task_id in reply]


def _features(spec: TaskSpec, payload_bytes: int) -> str:
    """A `Submitted` event less its id and times, as JSON."""
    features: dict[str, Any] = {
        "type": "submitted",
        "value": spec.value,
        "service": spec.service,
        "prompt_tokens": spec.text_bytes() // BYTES_PER_TOKEN + 1,
        "payload_bytes": payload_bytes,
        "max_tokens": spec.max_tokens,
        "preview": spec.preview(),
    }
    if spec.model is not None:
        features["model"] = spec.model
    if spec.expected_tokens is not None:
        features["expected_tokens"] = spec.expected_tokens
    return json.dumps(features)


_PLACEMENT_FIELDS = (
    "features",
    "submitted",
    "deadline",
    "strikes",
    "attempt",
    "node",
    "model",
    "dispatched",
    "claimed",
)


def _placement(task_id: str, row: list[bytes | None]) -> Placement:
    features, submitted, deadline, strikes, attempt, node, model, dispatched, claimed = (
        v.decode() if v else "" for v in row
    )
    event = json.loads(features) | {
        "id": task_id,
        "at": float(submitted),
        "deadline": float(deadline),
        "strikes": int(strikes),
        "attempt": int(attempt),
    }
    placed = (
        Dispatched(id=task_id, at=float(dispatched), node=node, model=model, attempt=int(attempt)) if node else None
    )
    begun = Claimed(id=task_id, at=float(claimed), node=node, attempt=int(attempt)) if claimed else None
    return Placement(Submitted.model_validate(event), placed, begun)


def _node(row: list[bytes | None]) -> tuple[NodeInfo, Heartbeat | None, bool] | None:
    info, beat, draining = row
    if info is None:
        return None
    try:
        heartbeat = Heartbeat.model_validate_json(beat) if beat else None
        return NodeInfo.model_validate_json(info), heartbeat, bool(draining)
    except ValidationError as error:  # one node's nonsense must not hide the others
        log.warning("node_unreadable", reason=field_errors(error))
        return None


def _record(task_id: str, raw: dict[bytes, bytes], result: bytes | None) -> TaskRecord:
    def text(name: bytes) -> str | None:
        return raw[name].decode() if name in raw else None

    return TaskRecord(
        id=task_id,
        state=State(raw[b"state"].decode()),
        spec=TaskSpec.model_validate_json(raw[b"payload"]),
        submitted=float(raw[b"submitted"]),
        deadline=float(raw[b"deadline"]),
        attempt=int(raw[b"attempt"]),
        strikes=int(raw[b"strikes"]),
        node=text(b"node"),
        model=text(b"model"),
        why=Explanation.model_validate_json(raw[b"why"]) if b"why" in raw else None,
        result=_result(task_id, result, [raw.get(name.encode()) for name in _ENDING]),
    )


#: Fields of a task that say how it was cancelled.
_ENDING = ("state", "submitted", "claimed", "finished")


def _result(task_id: str, raw: bytes | None, ending: Sequence[bytes | None]) -> Result | None:
    """A final task's result: as it was stored, or, of a cancelled one, as its record says."""
    if raw:
        return Result.model_validate_json(raw)
    state, submitted, claimed, finished = ending
    if state != b"cancelled" or submitted is None or finished is None:
        return None
    since = float(submitted)
    return Result(
        id=task_id,
        state=State.CANCELLED,
        on_time=False,
        latency=float(finished) - since,
        queued=float(claimed) - since if claimed else None,
        reason="cancelled on request",
    )


def later(a: str, b: str) -> bool:
    """Whether there is anything up to position `a` that is after `b`."""
    return any(_number(x) > _number(y) for x, y in zip(Mark.of(a), Mark.of(b), strict=True))


def gap(position: str, oldest: str) -> bool:
    """Whether events that followed a position may be gone, the oldest kept being at `oldest`."""
    places = zip(Mark.of(position), Mark.of(oldest), strict=True)
    return any(at != START and _number(at) < _number(first) for at, first in places)


def _number(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence or 0)


def in_order(reply: list[Any], count: int) -> Iterator[tuple[str, str, dict[bytes, bytes]]]:
    """What was read of both streams as one: stream, position, fields. Of one millisecond, what producers caused comes
    first. Beyond the end of what was read of one stream, which may go on, nothing is taken of the other."""
    read = {name.decode().rpartition(":")[2]: entries for name, entries in reply}
    ends = [_number(entries[-1][0].decode())[0] for entries in read.values() if len(entries) == count]
    horizon = min(ends, default=None)
    merged = [
        (*_number(position.decode()), stream, position.decode(), fields)
        for stream, entries in read.items()
        for position, fields in entries
    ]
    for milliseconds, _, stream, position, fields in sorted(merged, key=lambda e: (e[0], e[2] != "requests", e[1])):
        if horizon is None or milliseconds <= horizon:
            yield stream, position, fields


def _event(stream: str, position: str, fields: dict[bytes, bytes]) -> Event | None:
    """An entry's event. Whoever may submit may write to the stream `requests`: no more is believed there."""
    try:
        event = parse_event(fields[b"e"])
    except (ValidationError, KeyError):
        log.warning("event_unreadable", position=position)
        return None
    if stream == "requests" and not (
        isinstance(event, Submitted) or (isinstance(event, Ended) and event.state is State.CANCELLED)
    ):
        log.warning("event_forged", position=position, kind=event.type)
        return None
    return event
