"""What the ledger is told and holds of tasks and nodes, and how it is written and read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from perllm.broker.errors import InvalidTask, Unreadable, field_errors
from perllm.broker.logs import LazyLogger
from perllm.broker.messages import (
    DELTAS,
    Claimed,
    Delta,
    Dispatched,
    Explanation,
    Heartbeat,
    NodeBelief,
    NodeInfo,
    Result,
    State,
    Submitted,
    TaskSpec,
)
from perllm.broker.text_features import sketch_task, with_words

#: Bytes of a task beside its payload, features and result, about (as in ledger.lua).
TASK_BYTES = 1024

_BELIEFS: TypeAdapter[dict[str, NodeBelief]] = TypeAdapter(dict[str, NodeBelief], config=ConfigDict(defer_build=True))
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,254}")

Verdict = Literal["ok", "void"]
#: What a Celery producer sees of an end without a result; see EXCEPTION in `ledger.lua`.
EndKind = Literal["failed", "expired", "rejected", "refused", "revoked", "chord"]
Ruling = Literal["ok", "refused", "not_leader", "node_gone"]

log = LazyLogger(__name__)


class Entry(NamedTuple):
    """One task as it is stored."""

    id: str
    payload: str
    features: str
    window: float  # the deadline, s from now
    key: str
    tenant: str
    celery: str = ""  # what Celery is to be told on the way, if its producer is Celery's
    followers: str = ""  # what that producer wants to follow it

    @property
    def size(self) -> int:
        """Bytes it takes before it has a result, as the ledger counts them."""
        reserved: int = 2 * json.loads(self.features).get("result_bytes", 0)
        texts = sum(len(text.encode()) for text in (self.payload, self.features, self.followers))
        return TASK_BYTES + texts + reserved


class Stored(NamedTuple):
    """What became of a task that was handed in."""

    id: str  # in force: its own, or that of the first task under its idempotency key
    at: float  # when it was handed in, by the server's clock


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


class Gone(NamedTuple):
    """A node that is no more: it `left`, or it died."""

    info: NodeInfo
    at: float  # when, s, the server's clock
    left: bool


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


def entry(task_id: str, spec: TaskSpec) -> Entry:
    """A task as it is stored. Raises InvalidTask for one that cannot be written."""
    try:
        payload = spec.model_dump_json(exclude_defaults=True)
        key = idempotency_name(spec.tenant, spec.idempotency_key) if spec.idempotency_key else ""
        return Entry(task_id, payload, _features(spec, len(payload)), spec.deadline, key, spec.tenant)
    except (PydanticSerializationError, ValueError) as error:  # not checked at the door, but made otherwise
        raise InvalidTask(f"task: it cannot be written: {error}") from None


def weight(spec: TaskSpec) -> int:
    """Bytes a task takes before it has a result, as the ledger counts them. Raises InvalidTask."""
    return entry("", spec).size


def is_id(task_id: str) -> bool:
    """Whether this can be a task's id: ids are the producers' own, and become parts of keys and messages."""
    return _ID.fullmatch(task_id) is not None


def idempotency_name(tenant: str, key: str) -> str:
    """A tenant's name holds no space, so two tenants' keys are never the same."""
    return f"{tenant} {key}"


def _features(spec: TaskSpec, payload_bytes: int) -> str:
    """A `Submitted` event less its id and times, as JSON."""
    features: dict[str, Any] = {
        "type": "submitted",
        "value": spec.value,
        "service": spec.service,
        "tenant": spec.tenant,
        "prompt_tokens": spec.estimated_tokens(),
        "payload_bytes": payload_bytes,
        "max_tokens": spec.max_tokens,
        "preview": spec.preview(),
        "text": sketch_task(spec) if spec.kind == "generate" else "",  # from which output lengths are learned
        "needs": spec.needs(),
    }
    if spec.kind != "generate":
        features["kind"] = spec.kind
    if expected := spec.embeddings_bytes():
        features["result_bytes"] = expected
    if spec.n > 1:
        features["n"] = spec.n
    if spec.fit_context:
        features["fit_context"] = True
    if spec.model is not None:
        features["model"] = spec.model
    if spec.expected_tokens is not None:
        features["expected_tokens"] = spec.expected_tokens
    if spec.start_after:
        features["start_after"] = spec.start_after
    if origin := spec.origin():
        features["origin"] = origin
    return json.dumps(features)


def deltas_of(text: str) -> list[Delta]:
    try:
        return DELTAS.validate_json(text)
    except ValidationError as error:
        log.warning("deltas_unreadable", reason=field_errors(error))
        return []


def text_of(raw: bytes) -> str:
    return raw.decode(errors="replace")


def state_of(raw: bytes | None) -> State | None:
    try:
        return State(text_of(raw)) if raw else None
    except ValueError:
        log.warning("state_unreadable", state=raw)
        return None


def _why(task_id: str, raw: bytes | None, spec: TaskSpec) -> Explanation | None:
    try:
        return with_words(Explanation.model_validate_json(raw), spec) if raw else None
    except ValidationError as error:
        log.warning("explanation_unreadable", task_id=task_id, reason=field_errors(error))
        return None


def _reason(error: Exception) -> str:
    return field_errors(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"


#: How a producer may end a task, and the reason its result has then: at its wish, or late, where nobody else was there
#: to end it.
WITHDRAWN = {State.CANCELLED: "cancelled on request", State.EXPIRED: "the deadline passed"}
#: Fields of a task that say how its producer ended it.
ENDING_FIELDS = ("state", "submitted", "claimed", "finished")


def result_of(task_id: str, raw: bytes | None, ending: Sequence[bytes | None] | None) -> Result | None:
    """A final task's result: as it was stored or, of one that its producer ended, as its record says."""
    try:
        if raw:
            return Result.model_validate_json(raw)
        how, submitted, claimed, finished = ending or (None,) * 4
        if how is None or submitted is None or finished is None or (state := State(how.decode())) not in WITHDRAWN:
            return None
        since = float(submitted)
        return Result(
            id=task_id,
            state=state,
            on_time=False,
            latency=float(finished) - since,
            queued=float(claimed) - since if claimed else None,
            reason=WITHDRAWN[state],
        )
    except ValueError as error:  # whoever waits for it, or for its neighbours, shall know
        log.warning("result_unreadable", task_id=task_id, reason=_reason(error))
        reason = "what is stored of its result cannot be read"
        return Result(id=task_id, state=State.FAILED, on_time=False, latency=0.0, reason=reason)


def outcome_of(task_id: str, row: Sequence[bytes | None] | None, now: float) -> Result | float | None:
    """Of a task without a stored result, by its ENDING_FIELDS and deadline: its result, seconds to its deadline, or
    None where there is no such task. One that cannot be read is waited for until the ledger ends it."""
    if row is None:
        return inf
    if row[0] is None:
        return None
    try:
        return result_of(task_id, None, row[:-1]) or float(row[-1] or "inf") - now
    except ValueError:
        return inf


def record_of(task_id: str, raw: dict[bytes, bytes], result: bytes | None) -> TaskRecord:
    def text(name: bytes) -> str | None:
        return text_of(raw[name]) if name in raw else None

    try:
        spec = TaskSpec.model_validate_json(raw[b"payload"])
        return TaskRecord(
            id=task_id,
            state=State(text_of(raw[b"state"])),
            spec=spec,
            submitted=float(raw[b"submitted"]),
            deadline=float(raw[b"deadline"]),
            attempt=int(raw[b"attempt"]),
            strikes=int(raw[b"strikes"]),
            node=text(b"node"),
            model=text(b"model"),
            why=_why(task_id, raw.get(b"why"), spec),
            result=result_of(task_id, result, [raw.get(name.encode()) for name in ENDING_FIELDS]),
        )
    except (KeyError, ValueError) as error:
        raise Unreadable(f"what is stored of task {task_id!r} cannot be read: {_reason(error)}") from None


def glance_of(shown: Any, payload: Any, result: Any) -> Glance | None:
    try:
        state, features = shown
        told = json.loads(features)
        return Glance(State(state.decode()), told["service"], told.get("model"), payload + result)
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


PLACEMENT_FIELDS = (
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


def placement_of(task_id: str, row: list[bytes | None]) -> Placement | None:
    features, submitted, deadline, strikes, attempt, node, model, dispatched, claimed = (
        text_of(v) if v else "" for v in row
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


def node_of(row: list[bytes | None]) -> tuple[NodeInfo, Heartbeat | None, bool] | None:
    info, beat, draining = row
    if info is None:
        return None
    try:
        heartbeat = Heartbeat.model_validate_json(beat) if beat else None
        return NodeInfo.model_validate_json(info), heartbeat, bool(draining)
    except ValidationError as error:  # one node's nonsense must not hide the others
        log.warning("node_unreadable", reason=field_errors(error))
        return None


def beliefs_of(raw: bytes | None) -> dict[str, NodeBelief]:
    try:
        return _BELIEFS.validate_json(raw) if raw else {}
    except ValidationError as error:
        log.warning("learned_unreadable", reason=field_errors(error))
        return {}


def gone_of(raw: bytes) -> Gone | None:
    at, _, info = text_of(raw).partition(" ")
    try:
        return Gone(NodeInfo.model_validate_json(info), float(at), info.startswith('{"left":true,'))
    except ValueError as error:
        log.warning("node_unreadable", reason=_reason(error))
        return None
