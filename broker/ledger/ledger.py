"""The ledger's Python face: one method per operation of `ledger.lua`, typed. Times in s, the server's clock."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import redis
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from perllm.broker.connection import REPLY_TIMEOUT, connect, of_a_record, reaching
from perllm.broker.errors import InvalidTask, Unreadable, field_errors
from perllm.broker.ledger.script import Argument, Script
from perllm.broker.logs import LazyLogger
from perllm.broker.messages import (
    BYTES_PER_TOKEN,
    Claimed,
    Dispatched,
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
from perllm.broker.text_features import sketch_task, with_words

if TYPE_CHECKING:  # loaded when settings are read: half of what importing a client would take
    from perllm.broker.settings import Settings

#: Bytes of a task beside its payload, features and result, about (as in ledger.lua).
TASK_BYTES = 1024
#: Seconds a dispatched task may wait unclaimed on a live node before it is placed anew (its old message is void then).
DISPATCH_LEASE = 30.0
#: Tasks and bytes of payload per call of `submit`: bounds how long one call holds the server.
SUBMIT_TASKS = 100
SUBMIT_BYTES = 1 << 20
#: Calls of `submit` on their way at once: few enough for the socket's buffer, so that the client goes on meanwhile.
SUBMIT_CALLS = 3
#: Pieces of a streamed task's text that are kept; a worker adds at most one every `SAY_EVERY` s.
TEXT_PIECES = 20_000
SAY_EVERY = 0.05
#: Things of each kind mended per call of `sweep`, for the same reason.
SWEEP_LIMIT = 500

Verdict = Literal["ok", "void"]
Ruling = Literal["ok", "refused", "not_leader", "node_gone"]

log = LazyLogger(__name__)


class Entry(NamedTuple):
    """One task as it is stored."""

    id: str
    payload: str
    features: str
    deadline: float  # s from now
    key: str
    tenant: str

    @property
    def size(self) -> int:
        """Bytes it takes before it has a result, as the ledger counts them."""
        return TASK_BYTES + len(self.payload.encode()) + len(self.features.encode())


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


class Leader(NamedTuple):
    """The scheduler that leads: what it writes under the key `leader` and everybody may read."""

    holder: str  # of the lease; one per process and leader session
    since: float  # when it asked for the lease, s, the server's clock
    policy: str  # its name
    sentence: str  # what that does

    def dump(self) -> str:
        """As it is written, always the same text for the same leader."""
        return json.dumps(self._asdict())

    @classmethod
    def parse(cls, text: str) -> Leader:
        """From what `dump` wrote. Of another release's only the holder is known."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return cls(text, 0.0, "", "")


class Claim(NamedTuple):
    """What a worker gets for a claimed attempt. `deadline` is in s from now."""

    payload: bytes
    deadline: float
    model: str


class Glance(NamedTuple):
    """What lists filter tasks by, and how many bytes the whole would be."""

    state: State
    service: str
    model: str | None
    size: int


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

    Raises perllm.broker.errors.Unreachable when the server cannot be used; nothing is half-done then, and any call may be
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
        stored; submitting the same ids again is harmless. Raises InvalidTask for one that cannot be written.
        """
        return self.store(entry(task_id, spec) for task_id, spec in tasks)

    def store(self, entries: Iterable[Entry]) -> list[str]:
        """`submit` for tasks that are written already."""
        calls = self._submissions(entries)
        pieces = iter(lambda: list(islice(calls, SUBMIT_CALLS)), [])
        with reaching(self._settings):
            return [task_id for replies in self._script.stream(pieces) for task_id in _ids(replies)]

    @staticmethod
    def _submissions(entries: Iterable[Entry]) -> Iterator[tuple[Argument, ...]]:
        call: list[Argument] = ["submit"]
        size = 0
        for written in entries:
            call += written
            size += len(written.payload)
            if len(call) > 6 * SUBMIT_TASKS or size > SUBMIT_BYTES:
                yield tuple(call)
                call, size = ["submit"], 0
        if len(call) > 1:
            yield tuple(call)

    def holders(self, tenant: str, keys: Sequence[str]) -> list[str | None]:
        """The tasks that were submitted with these idempotency keys, None where there is none, in order."""
        if not keys:
            return []
        with reaching(self._settings):
            names = [f"{self.prefix}key:{_idempotent(tenant, key)}" for key in keys]
            return [_text(raw) if raw else None for raw in cast("list[bytes | None]", self.client.mget(names))]

    def cancel(self, task_id: str) -> State | None:
        """End a task as cancelled. Returns the state it was found in (a final one stays as it is), None if unknown."""
        return _state(self._call("cancel", task_id))

    def forget(self, task_id: str) -> bool:
        """Drop a task and all that is kept of it, its prompt, text and result; it is cancelled first if it goes on.
        False if there is none."""
        return self._call("forget", task_id) is not None

    def forget_many(self, task_ids: Sequence[str]) -> None:
        """`forget` for many, in one round trip."""
        self._pipeline([("forget", i) for i in task_ids])

    def cancel_many(self, task_ids: Sequence[str]) -> list[State | None]:
        """`cancel` for many, in one round trip."""
        return [_state(r) for r in self._pipeline([("cancel", i) for i in task_ids])]

    def task(self, task_id: str) -> TaskRecord | None:
        """Everything known of a task, or None. Raises Unreadable."""
        with reaching(self._settings):
            try:
                raw = cast("dict[bytes, bytes]", self.client.hgetall(f"{self.prefix}task:{task_id}"))
            except redis.exceptions.ResponseError as error:
                if not of_a_record(error):
                    raise
                raise Unreadable(f"what is stored as task {task_id!r} is none: {error}") from None
        return _record(task_id, raw) if raw else None

    def glances(self, task_ids: Sequence[str]) -> list[Glance | None]:
        """What lists filter by, None for the unknown and the unreadable, in order; without the tasks' texts."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                key = f"{self.prefix}task:{task_id}"
                pipe.hmget(key, "state", "features")
                pipe.hstrlen(key, "payload")
                pipe.hstrlen(key, "result")
            replies = list(_each(pipe.execute(raise_on_error=False)))
        return [_glance(*row) for row in zip(replies[::3], replies[1::3], replies[2::3], strict=True)]

    def legible(self, task_ids: Sequence[str]) -> list[TaskRecord]:
        """Everything known of those of these tasks that are there, in order. One that cannot be read is logged and
        passed over."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hgetall(f"{self.prefix}task:{task_id}")
            rows = list(_each(pipe.execute(raise_on_error=False)))
        found = []
        for task_id, raw in zip(task_ids, rows, strict=True):
            try:
                found += [_record(task_id, raw)] if raw else []
            except Unreadable as error:
                log.warning("task_unreadable", task_id=task_id, reason=str(error))
        return found

    def results(self, task_ids: Sequence[str]) -> list[Result | None]:
        """The results of those that are final, None for the others and the unknown, in order. One that cannot be read
        is that of a failed task which says so."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hget(f"{self.prefix}task:{task_id}", "result")
            rows = _each(pipe.execute(raise_on_error=False))
            return [_result(task_id, raw) for task_id, raw in zip(task_ids, rows, strict=True)]

    def states(self, task_ids: Sequence[str]) -> list[State | None]:
        """Where these tasks are, None for the unknown, in order."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hget(f"{self.prefix}task:{task_id}", "state")
            return [_state(raw) for raw in _each(pipe.execute(raise_on_error=False))]

    def tenants(self, task_ids: Sequence[str]) -> list[str | None]:
        """Whose these tasks are, None for the unknown, in order."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hget(f"{self.prefix}task:{task_id}", "tenant")
            return [_text(raw) if raw else None for raw in _each(pipe.execute(raise_on_error=False))]

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
        return [_text(i) for i in cast("list[bytes]", raw)]

    def stored_bytes(self, tenants: Sequence[str]) -> list[int]:
        """Bytes the tasks of these tenants take, finished ones and results included, in order."""
        with reaching(self._settings):
            raw = cast("list[bytes | None]", self.client.hmget(f"{self.prefix}bytes", list(tenants)))
        return [int(n) if n else 0 for n in raw]

    def text(self, task_id: str, start: int = 0) -> list[tuple[int, str]]:
        """The pieces of a streamed task's text from number `start` on, each with the attempt that generated it."""
        with reaching(self._settings):
            raw = cast("list[bytes]", self.client.lrange(f"{self.prefix}text:{task_id}", start, -1))
        pairs = (_text(piece).partition(" ") for piece in raw)
        return [(int(attempt) if attempt.isdecimal() else 0, text) for attempt, _, text in pairs]

    def news(self, watched: Sequence[tuple[str, int]]) -> list[bool]:
        """For tasks, each with how many pieces of its text are known (-1: they do not matter): whether there is more,
        or it has ended or is no more, or cannot be read; in one round trip."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id, pieces in watched:
                pipe.hget(f"{self.prefix}task:{task_id}", "state")
                if pieces >= 0:
                    pipe.llen(f"{self.prefix}text:{task_id}")
            replies = iter(pipe.execute(raise_on_error=False))
        waiting = {State.PENDING.encode(), State.DISPATCHED.encode(), State.RUNNING.encode()}
        return [(next(replies) not in waiting) | (pieces >= 0 and next(replies) != pieces) for _, pieces in watched]

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
        return [_text(i) for i in cast("list[bytes]", raw)]

    def led(self) -> bool:
        """Whether a scheduler leads."""
        with reaching(self._settings):
            return bool(self.client.exists(f"{self.prefix}leader"))

    def leader(self) -> Leader | None:
        """Which scheduler leads, since when, under which policy; None while none does."""
        with reaching(self._settings):
            raw = cast("bytes | None", self.client.get(f"{self.prefix}leader"))
        return Leader.parse(raw.decode()) if raw else None

    # --- scheduler

    def lead(self, holder: str, ttl: float) -> int | None:
        """Become or stay leader for `ttl` s. Returns the epoch to dispatch under, None while another leads. `holder` is
        the same text as long as it leads: a `Leader.dump()`, so that others see who it is."""
        reply = self._call("lead", holder, ttl)
        return int(reply) if reply else None

    def resign(self, holder: str) -> None:
        """Stop leading, so a standby takes over at once."""
        self._call("resign", holder)

    def dispatch(self, epoch: int, dispatches: Sequence[Dispatch]) -> list[Ruling]:
        """Send pending tasks to their nodes' queues: state, event and message are one call each, all one round trip."""
        return self._rulings(
            ("dispatch", epoch, *d[:7], d.why.model_dump_json(exclude_defaults=True), DISPATCH_LEASE)
            for d in dispatches
        )

    def end(self, epoch: int, ends: Sequence[End]) -> list[Ruling]:
        """Reject or expire pending tasks, in one round trip."""
        return self._rulings(
            ("end", epoch, e.id, e.state, e.why.sentence, e.why.model_dump_json(exclude_defaults=True)) for e in ends
        )

    def _rulings(self, calls: Iterable[tuple[Argument, ...]]) -> list[Ruling]:
        """One that fails on its task's record is refused, and the sweep ends the task in time."""
        with reaching(self._settings):
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
        how many; a full sweep is done when it is less than SWEEP_LIMIT."""
        s = self._settings
        return int(self._call("sweep", SWEEP_LIMIT, s.max_strikes, s.retention_tasks))

    def save_snapshot(self, epoch: int, state: dict[str, Any]) -> bool:
        """Keep the scheduler's learned state; False when this epoch no longer leads."""
        return bool(self._call("snapshot", epoch, json.dumps(state)) == b"ok")

    def load_snapshot(self) -> dict[str, Any] | None:
        """The state last saved, or None."""
        with reaching(self._settings):
            raw = cast("bytes | None", self.client.get(f"{self.prefix}snapshot"))
        return cast("dict[str, Any]", json.loads(raw)) if raw else None

    def events(self, after: str, *, count: int = 1000, block: float | None = None) -> list[tuple[str, Event]]:
        """Up to `count` events later than the stream position `after`, waiting up to `block` s for one. An entry that
        is no event is logged and skipped."""
        wait = None if block is None else max(1, int(block * 1000))
        while True:
            with reaching(self._settings):
                reply = cast(
                    "list[Any] | None", self.client.xread({f"{self.prefix}events": after}, count=count, block=wait)
                )
            if not reply:
                return []
            if events := list(_events(reply[0][1])):
                return events
            after = reply[0][1][-1][0]  # none of these is readable; what follows may be

    def first_and_last_event(self) -> tuple[str, str]:
        """Stream positions of the oldest event kept and the newest ("0-0" for an empty stream)."""
        with reaching(self._settings):
            oldest = cast("list[Any]", self.client.xrange(f"{self.prefix}events", count=1))
            newest = cast("list[Any]", self.client.xrevrange(f"{self.prefix}events", count=1))
        return (oldest[0][0].decode(), newest[0][0].decode()) if oldest and newest else ("0-0", "0-0")

    def unfinished(self) -> Iterator[tuple[State, str]]:
        """Every pending, dispatched and running task's id."""
        for state in (State.RUNNING, State.DISPATCHED, State.PENDING):
            for task_id in self.ids(state):
                yield state, task_id

    def features(self, task_ids: Sequence[str]) -> list[Placement | None]:
        """What the scheduler needs to know of tasks, as events it would have read, in order; None for unknown ids, and
        for those of which it cannot be read."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for task_id in task_ids:
                pipe.hmget(f"{self.prefix}task:{task_id}", *_PLACEMENT_FIELDS)
            rows = _each(pipe.execute(raise_on_error=False))
            return [_placement(i, row) if row and row[0] else None for i, row in zip(task_ids, rows, strict=True)]

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
            rows = _each(pipe.execute(raise_on_error=False))
            return [node for row in rows if row and (node := _node(row)) is not None]


def weight(spec: TaskSpec) -> int:
    """Bytes a task takes before it has a result, as the ledger counts them. Raises InvalidTask."""
    return entry("", spec).size


def _glance(shown: Any, payload: Any, result: Any) -> Glance | None:
    try:
        state, features = shown
        told = json.loads(features)
        return Glance(State(state.decode()), told["service"], told.get("model"), payload + result)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def _ids(replies: list[Any]) -> list[str]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [task_id.decode() for reply in replies for task_id in reply]


def _each(replies: list[Any]) -> Iterator[Any]:
    """Replies one by one, None for a thing of another kind than it is to be; a failure that is not the thing's is
    raised."""
    for reply in replies:
        if isinstance(reply, Exception) and not of_a_record(reply):
            raise reply
        yield None if isinstance(reply, Exception) else reply


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _state(raw: bytes | None) -> State | None:
    try:
        return State(_text(raw)) if raw else None
    except ValueError:
        log.warning("state_unreadable", state=raw)
        return None


def entry(task_id: str, spec: TaskSpec) -> Entry:
    """A task as it is stored. Raises InvalidTask for one that cannot be written."""
    try:
        payload = spec.model_dump_json(exclude_defaults=True)
        key = _idempotent(spec.tenant, spec.idempotency_key) if spec.idempotency_key else ""
        return Entry(task_id, payload, _features(spec, len(payload)), spec.deadline, key, spec.tenant)
    except (PydanticSerializationError, ValueError) as error:  # not checked at the door, but made otherwise
        raise InvalidTask(f"task: it cannot be written: {error}") from None


def _idempotent(tenant: str, key: str) -> str:
    """A tenant's name holds no space, so two tenants' keys are never the same."""
    return f"{tenant} {key}"


def _features(spec: TaskSpec, payload_bytes: int) -> str:
    """A `Submitted` event less its id and times, as JSON."""
    features: dict[str, Any] = {
        "type": "submitted",
        "value": spec.value,
        "service": spec.service,
        "tenant": spec.tenant,
        "prompt_tokens": spec.text_bytes() // BYTES_PER_TOKEN + 1,
        "payload_bytes": payload_bytes,
        "max_tokens": spec.max_tokens,
        "preview": spec.preview(),
        "text": sketch_task(spec),
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


def _placement(task_id: str, row: list[bytes | None]) -> Placement | None:
    features, submitted, deadline, strikes, attempt, node, model, dispatched, claimed = (
        _text(v) if v else "" for v in row
    )
    try:
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
    except (ValueError, TypeError, RecursionError) as error:
        log.warning("features_unreadable", task_id=task_id, reason=_reason(error))
        return None


def _reason(error: Exception) -> str:
    return field_errors(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"


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


def _result(task_id: str, raw: bytes | None) -> Result | None:
    if not raw:
        return None
    try:
        return Result.model_validate_json(raw)
    except ValidationError as error:  # whoever waits for it, or for its neighbours, shall know
        log.warning("result_unreadable", task_id=task_id, reason=field_errors(error))
        reason = "what is stored of its result cannot be read"
        return Result(id=task_id, state=State.FAILED, on_time=False, latency=0.0, reason=reason)


def _why(task_id: str, raw: bytes | None, spec: TaskSpec) -> Explanation | None:
    try:
        return with_words(Explanation.model_validate_json(raw), spec) if raw else None
    except ValidationError as error:
        log.warning("explanation_unreadable", task_id=task_id, reason=field_errors(error))
        return None


def _record(task_id: str, raw: dict[bytes, bytes]) -> TaskRecord:
    def text(name: bytes) -> str | None:
        return _text(raw[name]) if name in raw else None

    try:
        spec = TaskSpec.model_validate_json(raw[b"payload"])
        return TaskRecord(
            id=task_id,
            state=State(_text(raw[b"state"])),
            spec=spec,
            submitted=float(raw[b"submitted"]),
            deadline=float(raw[b"deadline"]),
            attempt=int(raw[b"attempt"]),
            strikes=int(raw[b"strikes"]),
            node=text(b"node"),
            model=text(b"model"),
            why=_why(task_id, raw.get(b"why"), spec),
            result=_result(task_id, raw.get(b"result")),
        )
    except (KeyError, ValueError) as error:
        raise Unreadable(f"what is stored of task {task_id!r} cannot be read: {_reason(error)}") from None


def _events(entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> Iterator[tuple[str, Event]]:
    for position, fields in entries:
        try:
            yield position.decode(), parse_event(fields[b"e"])
        except (ValidationError, KeyError):
            log.warning("event_unreadable", position=_text(position))
