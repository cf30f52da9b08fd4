"""Follows the event stream over every restart of the server, and reads the ledger when all is over."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any, cast

import redis
from support.raw import prefix_of, redis_of

from chaos.history import Dump, Row, Seen
from perllm.broker.connection import connect, reaching
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.ledger.events import Mark, in_order
from perllm.broker.settings import Settings

#: Seconds before the server's end from which on its stream is read again: far more than it can have lost.
_LOOK_BACK = 10.0
_CHUNK = 1000
_SHOWN = ("submitted", "dispatched", "claimed", "completed", "returned", "ended", "node_up", "node_down")


class Observer:
    """A thread that keeps every event it was shown. `undone` are the positions of those that are gone since."""

    def __init__(self, settings: Settings) -> None:
        self.events: list[Seen] = []
        self.undone: set[str] = set()
        self._client = connect(settings)
        self._positions = {f"{{{settings.cell}}}:{stream}": "0-0" for stream in Mark._fields}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="observer", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                with self._lock:
                    found = self._read()
            except redis.exceptions.RedisError:
                found = False
            if not found:
                self._closed.wait(0.02)

    def _read(self) -> bool:
        reply = cast("list[Any]", self._client.xread(dict(self._positions), count=_CHUNK) or [])
        cell = next(iter(self._positions)).rpartition(":")[0]
        for stream, position, fields in in_order(reply, _CHUNK):
            self._positions[f"{cell}:{stream}"] = position
            if (event := _seen(f"{position} {stream}", fields[b"e"])) is not None:
                self.events.append(event)
        return bool(reply)

    def server_came_back(self, ended: float) -> None:
        """The server ended by force at that time and answers again: note what it no longer knows."""
        since = int((ended - _LOOK_BACK) * 1000)
        with self._lock:
            kept = {
                f"{position.decode()} {key.rpartition(':')[2]}"
                for key in self._positions
                for position, _ in cast("list[Any]", self._client.xrange(key, min=since))
            }
            for event in reversed(self.events):
                if int(event.position.split("-")[0]) < since:
                    break
                if event.position not in kept:
                    self.undone.add(event.position)

    def close(self) -> None:
        """Read what is left and stop."""
        self._closed.set()
        self._thread.join()
        while self._read():
            pass
        self._client.close()


def _seen(position: str, raw: bytes) -> Seen | None:
    event = json.loads(raw)
    kind = event["type"]
    if kind not in _SHOWN:
        return None
    return Seen(
        position,
        event["at"],
        kind,
        event.get("id", ""),
        event["info"]["name"] if kind == "node_up" else event.get("node", ""),
        event.get("attempt", 0),
        event.get("state", ""),
        event.get("cause", ""),
        event.get("strikes", 0),
        event.get("preview", " ").split(" ", 1)[0],
        event.get("reason", ""),
        event["deadline"] - event["at"] if kind == "submitted" else 0.0,
        event["receipt"]["model"] if kind == "completed" else "",
    )


def digest(result: bytes) -> str:
    """A result as stored, to compare it with itself later."""
    return hashlib.sha1(result, usedforsecurity=False).hexdigest()


def dump(ledger: Ledger) -> Dump:
    """Everything in the server's database."""
    out = Dump(totals=ledger.totals())
    task, state, tenant, result = (f"{prefix_of(ledger)}{kind}:" for kind in ("task", "in", "of", "result"))
    ids = []
    results = set()
    for raw in redis_of(ledger).scan_iter(count=10_000):
        key = raw.decode()
        if key.startswith(task):
            ids.append(key.removeprefix(task))
        elif key.startswith(state):
            out.sets[key.removeprefix(state)] = _members(ledger, key)
        elif key.startswith(tenant):
            out.tenants[key.removeprefix(tenant)] = _members(ledger, key)
        elif key.startswith(result):
            results.add(key.removeprefix(result))
        elif key == f"{prefix_of(ledger)}bytes":
            counted = cast("dict[bytes, bytes]", redis_of(ledger).hgetall(key))
            out.held = {name.decode(): int(size) for name, size in counted.items()}
        elif key.startswith("celery-task-meta-"):
            out.celery_results.add(key.removeprefix("celery-task-meta-"))
        else:
            out.other_keys.add(key)
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        pipe = redis_of(ledger).pipeline(transaction=False)
        for task_id in chunk:
            pipe.hmget(task + task_id, "state", "attempt", "strikes", "withdrawn")
            pipe.get(result + task_id)
            pipe.hstrlen(task + task_id, "payload")
            pipe.hstrlen(task + task_id, "features")
        rows = pipe.execute()
        out.tasks |= {
            i: _row(*fields, raw, payload + features)
            for i, fields, raw, payload, features in zip(chunk, *(rows[k::4] for k in range(4)), strict=True)
        }
    out.other_keys |= {result + i for i in results - {i for i, row in out.tasks.items() if not row.withdrawn}}
    return out


def _members(ledger: Ledger, key: str) -> set[str]:
    return {m.decode() for m in cast("list[bytes]", redis_of(ledger).zrange(key, 0, -1))}


def _row(
    state: bytes, attempt: bytes, strikes: bytes, withdrawn: bytes | None, result: bytes | None, record: int
) -> Row:
    stored = record + 2 * len(result or b"")
    if withdrawn:  # its record is its result
        result = result or b'{"state":"%s"}' % state
    says = json.loads(result) if result else {}
    return Row(
        state.decode(),
        int(attempt),
        int(strikes),
        digest(result) if result else None,
        says.get("state"),
        says["receipt"]["attempt"] if "receipt" in says else None,
        stored,
        bool(withdrawn),
    )


def unfinished(ledger: Ledger) -> int | None:
    """How many tasks are not final, or final and not yet told of; None while the server does not answer."""
    try:
        with reaching(ledger.settings):
            untold = cast("int", redis_of(ledger).hlen(f"{prefix_of(ledger)}untold"))
        return untold + sum(n for state, n in ledger.counts().items() if not state.final)
    except Unreachable:
        return None
