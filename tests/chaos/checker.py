"""Reads a run's history and says what was broken. Pure: no I/O, no clock.

The invariants, each with the name its violations go by:

lost         a task somebody was told is accepted, and that is neither in the ledger nor ever reached a final state
doubled      a task with two final states, or two tasks under one idempotency key, the first of them not yet forgotten
overwritten  a result that is not the one its task reached, or not the one a producer saw before
stuck        a task without a final state when all has settled, or that expired although it had AMPLE s
path         events no task's life can have: an attempt out of turn, a claim on another node, anything after the end
strikes      strikes that do not count faults, or that go beyond the limit
phantom      a task nobody submitted
undone       an event that was shown and then gone, other than by what `everysec` allows
drift        counters and sets that disagree with the tasks and the events
leaked       a key that belongs to nothing alive

With `appendfsync everysec` a server that ends by force may forget its last second: what happened within WINDOW before
such an end may be gone, and a result seen then may differ. Nothing else is excused, and with `always` nothing at all.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from chaos.history import History, Row, Seen

#: Seconds `everysec` may lose: one, and one more while an fsync is under way (Valkey postpones a write for so long).
WINDOW = 2.0
#: Seconds that are enough for any task of a run, whatever dies meanwhile.
AMPLE = 120.0
FINAL = ("succeeded", "failed", "expired", "rejected", "cancelled")
STATES = ("pending", "dispatched", "running", *FINAL)
#: What the ledger counts for a task beside its texts, bytes.
TASK_BYTES = 1024
#: Keys that outlive all work: the ledger's own; idempotency keys and streamed texts, which expire; and what Celery
#: keeps per kind of queue.
_LASTING = re.compile(
    r"\{\w+\}:(events|requests|totals|epoch|leader|snapshot|metrics|learned|gone|api:file-stores|key:.+|text:.+)"
    r"|_kombu\.binding.+|inbox:(unacked_mutex|takers)"
)


class Violation(NamedTuple):
    """One thing that is wrong. `subject` is a task's id, a key, or a counter's name."""

    kind: str
    subject: str
    detail: str


@dataclass
class Report:
    """What the checker found. `forgiven` counts tasks `everysec` has lost as it may, `oldest` is how long before the
    server's end the first of those was accepted, s."""

    violations: list[Violation]
    tasks: int
    ended: Counter[str]
    attempts_max: int
    forgiven: int
    oldest: float

    def count(self, *kinds: str) -> int:
        """Subjects with a violation of these kinds."""
        return len({v.subject for v in self.violations if v.kind in kinds})


def check(history: History) -> Report:
    """Hold a history against every invariant."""
    return _Check(history).report()


class _Check:
    """The history, indexed."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.dump = history.dump
        self.violations: list[Violation] = []
        self.lives: dict[str, list[Seen]] = defaultdict(list)  # task → its events, without those undone
        self._ends: dict[str, list[int]] = defaultdict(list)  # state → where in the history tasks ended so
        self._submitted: dict[str, list[tuple[int, str]]] = defaultdict(list)  # key → where, and the task
        for place, event in enumerate(history.events):
            if event.id and event.position not in history.undone:
                self.lives[event.id].append(event)
                if _is_end(event):
                    self._ends[event.state].append(place)
                if event.type == "submitted":
                    self._submitted[event.key].append((place, event.id))
        for events in self.lives.values():
            # A producer's end of a task is in another stream than what nodes do: of one millisecond it came last.
            events.sort(key=lambda e: (int(e.position.split("-")[0]), e.type == "ended"))
        self._forgetful = sorted(o.at for o in history.outages if o.fsync != "always")
        self._losing = sorted(o.at for o in history.outages if o.fsync == "everysec")

    def report(self) -> Report:
        forgiven = self.check_accepted()
        self.check_undone()
        for task_id in self.lives.keys() | self.dump.tasks.keys():
            self.check_life(task_id, self.lives.get(task_id, []), self.dump.tasks.get(task_id))
        self.check_saw()
        self.check_counters()
        self.check_keys()
        ends = Counter(e.state for events in self.lives.values() for e in events if _is_end(e))
        return Report(
            self.violations,
            tasks=len(self.lives),
            ended=ends,
            attempts_max=max((e.attempt for events in self.lives.values() for e in events), default=0),
            forgiven=len(forgiven),
            oldest=max(forgiven, default=0.0),
        )

    def found(self, kind: str, subject: str, detail: str) -> None:
        self.violations.append(Violation(kind, subject, detail))

    def until_forgotten(self, begun: float, at: float, *, accepted: bool = False) -> float | None:
        """Seconds from what happened between `begun` and `at` to the end by force that may have undone it, at least;
        None when none may. `accepted`: what happened is that somebody was told of a task's acceptance."""
        ends = self._losing if accepted else self._forgetful
        index = bisect_left(ends, begun)
        if index == len(ends) or ends[index] - at > WINDOW:
            return None
        return max(0.0, ends[index] - at)

    # --- what producers know

    def check_accepted(self) -> list[float]:
        """Returns, per task lost as `everysec` may, how long before the end it was accepted."""
        forgiven = []
        for told in self.history.told:
            if told.id in self.dump.tasks or any(map(_is_end, self.lives.get(told.id, []))):
                continue
            excuse = self.until_forgotten(told.begun, told.at, accepted=True)
            if excuse is None:
                self.found("lost", told.id, f"accepted at {told.at:.3f} under {told.key}")
            else:
                forgiven.append(excuse)
        for key, tasks in self._submitted.items():
            if key not in self.history.tried:
                self.found("phantom", key, f"{len(tasks)} task(s) of a key nobody used")
            again = sum(not self.forgotten(first, place) for (_, first), (place, _) in pairwise(tasks))
            if again:
                self.found("doubled", key, f"{1 + again} tasks under one idempotency key")
        return forgiven

    def forgotten(self, task_id: str, place: int) -> bool:
        """Whether the ledger kept a task, and so its key, no more at a place in the history: it had ended, and since
        then so many others in the same way."""
        end = next(filter(_is_end, self.lives[task_id]), None)
        if end is None:
            return False
        ends = self._ends[end.state]
        since = bisect_left(ends, place) - bisect_right(ends, self.history.events.index(end))
        return since >= self.history.retained

    def check_undone(self) -> None:
        for event in self.history.events:
            if event.position in self.history.undone and self.until_forgotten(event.at, event.at) is None:
                self.found("undone", event.id or event.node, f"{event.type} at {event.at:.3f}")

    def check_saw(self) -> None:
        for saw in self.history.saw:
            row = self.dump.tasks.get(saw.id)
            if row is not None and row.result != saw.digest and self.until_forgotten(saw.begun, saw.at) is None:
                self.found("overwritten", saw.id, f"a producer saw another result at {saw.at:.3f}")

    # --- one task

    def check_life(self, task_id: str, events: list[Seen], row: Row | None) -> None:
        ends = [e for e in events if _is_end(e)]
        if len(ends) > 1:
            self.found("doubled", task_id, f"final states: {', '.join(e.state for e in ends)}")
        if not events or events[0].type != "submitted":
            self.found("path", task_id, "in the ledger without having been submitted")
        elif (wrong := _misstep(events)) is not None:
            self.found("path", task_id, wrong)
        if ends and ends[-1].state == "expired" and events[0].window >= AMPLE:
            self.found("stuck", task_id, f"expired after {events[0].window:.0f} s: {ends[-1].reason}")
        for wrong in _miscounted(events, self.history.max_strikes):
            self.found("strikes", task_id, wrong)
        if row is None:
            if not ends and events:
                self.found("lost", task_id, f"gone from the ledger after {events[-1].type}")
            return
        if row.state not in FINAL:
            last = events[-1].type if events else "nothing"
            self.found("stuck", task_id, f"{row.state}, attempt {row.attempt}, after {last}")
            return
        if ends and row.state != ends[-1].state:
            self.found("overwritten", task_id, f"ended {ends[-1].state}, is {row.state}")
        if row.result is None or row.result_state != row.state:
            self.found("overwritten", task_id, f"is {row.state}, its result says {row.result_state}")
        if ends and ends[-1].type == "completed" and row.result_attempt != ends[-1].attempt:
            self.found("overwritten", task_id, f"attempt {ends[-1].attempt} ended it, result of {row.result_attempt}")
        dispatched = [e.attempt for e in events if e.type == "dispatched"]
        if row.attempt != len(dispatched):
            self.found("drift", task_id, f"attempt {row.attempt} after {len(dispatched)} dispatches")

    # --- counters and keys

    def check_counters(self) -> None:
        dump = self.dump
        for state in STATES:
            by_set = dump.sets.get(state, set())
            by_task = {i for i, row in dump.tasks.items() if row.state == state}
            for task_id in by_set ^ by_task:
                self.found("drift", task_id, f"in:{state} and the task's own state disagree")
        for task_id in set().union(*dump.tenants.values()) ^ dump.tasks.keys():
            self.found("drift", task_id, "in a tenant's list and in the ledger disagree")
        for tenant in dump.held.keys() | dump.tenants.keys():
            rows = [dump.tasks[i] for i in dump.tenants.get(tenant, set()) if i in dump.tasks]
            holds = sum(TASK_BYTES + row.stored for row in rows)
            if dump.held.get(tenant, 0) != holds:
                self.found("drift", tenant, f"counted as holding {dump.held.get(tenant, 0)} bytes, holds {holds}")
        held = Counter(row.state for row in dump.tasks.values() if row.state in FINAL)
        if sum(dump.totals.get(s, 0) for s in FINAL) - dump.totals.get("forgotten", 0) != held.total():
            self.found("drift", "forgotten", f"totals {dump.totals}, held {dict(held)}")
        counted = Counter(e.state for events in self.lives.values() for e in events if _is_end(e))
        counted["submitted"] = sum(1 for events in self.lives.values() if events[0].type == "submitted")
        for name in ("submitted", *FINAL):
            if dump.totals.get(name, 0) != counted[name]:
                self.found("drift", name, f"totals say {dump.totals.get(name, 0)}, the events {counted[name]}")

    def check_keys(self) -> None:
        for key in self.dump.other_keys:
            if not _LASTING.fullmatch(key):
                self.found("leaked", key, "a key of nothing alive")
        finished = {i for i, row in self.dump.tasks.items() if row.state in FINAL}
        for task_id in self.dump.celery_results ^ finished:
            self.found("leaked", task_id, "Celery's result and the task's disagree")


def _is_end(event: Seen) -> bool:
    return event.type in ("completed", "ended")


def _misstep(events: list[Seen]) -> str | None:
    """The first event that cannot follow the ones before it."""
    state, node, attempt = "pending", "", 0
    for event in events[1:]:
        here = (event.node, event.attempt) == (node, attempt)
        match state, event.type:
            case "pending", "dispatched" if event.attempt == attempt + 1:
                state, node, attempt = "dispatched", event.node, event.attempt
            case "dispatched", "claimed" if here:
                state = "running"
            case (("dispatched" | "running"), "returned") if here:
                state = "pending"
            case "running", "completed" if here:
                state = "final"
            case (("pending" | "dispatched" | "running"), "ended"):
                state = "final"
            case _:
                return f"{event.type} {event.attempt} on {event.node} while {state} {attempt} on {node}"
    return None


def _miscounted(events: list[Seen], limit: int) -> Iterator[str]:
    """Strikes: one per attempt that was claimed and then lost or failed; at the limit the task ends."""
    strikes, running = 0, False
    for event in events:
        match event.type:
            case "claimed":
                running = True
            case "returned":
                strikes += (event.cause == "lease_expired" and running) or event.cause == "failed"
                running = False
                if event.strikes != strikes:
                    yield f"{event.strikes} strikes told after {strikes} faults"
                if strikes >= limit:
                    yield f"pending again after {strikes} faults"
            case "ended" if event.state == "failed" and f"strike {limit} of {limit}" not in event.reason:
                yield f"failed after {strikes + 1} faults: {event.reason}"
            case "ended" if event.state == "failed" and strikes != limit - 1:
                yield f"failed as if after {limit} faults, after {strikes + 1}"
