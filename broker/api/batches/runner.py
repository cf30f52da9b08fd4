"""Runs batches: submits their lines, watches the tasks, collects the results.

Batches run side by side. Each advances in slices of a few milliseconds, tenants in turn and each tenant's batches in
turn, so that nobody's batch waits for the lines of another's. Lines are submitted as the limits of the batch's key and
the tenant's quota leave room for them; those there is no room for yet are fed as earlier ones end.

One thread of one API process does it at a time, under a lease. Every step may be repeated after a crash: a line's task
has an id made of the batch's and the line's number, and a part of the results is written before its lines are marked.
Results are collected while the ledger still holds them, so a batch may last longer than PERLLM_RETENTION. Nothing is
held in memory but a byte per line and the digests of `custom_id`s.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import IO, Any, TypeVar

import structlog

from perllm.broker.api.batches.store import ENDED, BatchDocument, Batches
from perllm.broker.api.files.store import FileDocument, Files
from perllm.broker.api.keys import Keys
from perllm.broker.api.leased_worker import PAUSE, Deposed, LeasedWorker
from perllm.broker.connection import reaching
from perllm.broker.errors import InvalidTask, Unreachable
from perllm.broker.ledger import Ledger, weight
from perllm.broker.messages import State, TaskSpec
from perllm.broker.openai import batch_file as lines
from perllm.broker.openai.translation import seconds_left
from perllm.broker.settings import Settings
from perllm.broker.validation import TaskValidator

#: What became of a line: submitted, refused at the door, succeeded, ended without a result; the last two, collected;
#: not yet submitted.
OPEN, REFUSED, SUCCEEDED, FAILED, COLLECTED_SUCCEEDED, COLLECTED_FAILED, UNFED = range(7)
#: Seconds a batch works before it is another's turn, about.
SLICE = 0.01
#: Batches of one tenant, and of all, that advance at once.
BESIDE, MOST_BESIDE = 2, 32
#: Lines, and bytes of them, submitted at once.
FEED_LINES, FEED_BYTES = 100, 1 << 20
#: Times in a row that a batch may meet a bug of ours before it is given up.
MOST_FAILURES = 3
#: Tasks looked at per s: a large batch is looked at less often.
LOOKS = 5000
#: Seconds after its window that a batch's tasks are ended by us, in case no scheduler does.
OVERTIME = 5.0
#: Uncollected results at which some are collected before the end, and results fetched at once.
COLLECT_AT, FETCH = 10_000, 100
#: Bad lines shown in the batch itself; all are in its error file.
SHOWN_ERRORS = 100

log = structlog.get_logger(__name__)
T = TypeVar("T")
_Place = tuple[int, int, int]  # in a file: lines before it that are not empty, all lines before it, bytes before it
Announce = Callable[[BatchDocument], object]


class _Unfit(Exception):
    """The batch cannot be run at all: (code, message)."""


class _Feeder:
    """Good lines gathered to be submitted together. `full`: there was no room for all, so nothing more is gathered."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, TaskSpec]] = []
        self.full = False
        self._size = 0

    def add(self, index: int, spec: TaskSpec) -> bool:
        """Gather a line; whether it is time to submit."""
        if self.full:
            return False
        self.waiting.append((index, spec))
        self._size += spec.text_bytes()
        return len(self.waiting) >= FEED_LINES or self._size > FEED_BYTES

    def take(self) -> list[tuple[int, TaskSpec]]:
        """What was gathered."""
        taken, self.waiting, self._size = self.waiting, [], 0
        return taken


class BatchRunner(LeasedWorker):
    """`announce` hears of every batch's end, once or more."""

    def __init__(self, settings: Settings, ledger: Ledger, files: Files, batches: Batches, announce: Announce) -> None:
        super().__init__(settings, ledger, "batches")
        self._files, self._batches, self._announce = files, batches, announce
        self._validator = TaskValidator(settings, ledger)
        self._keys = Keys(settings, ledger)
        self._work: OrderedDict[str, deque[tuple[BatchDocument, Iterator[None]]]] = OrderedDict()  # by tenant
        self._slice = 0.0  # when the present one ends, monotonic
        self._due: dict[str, float] = {}  # when each batch is to be looked at, monotonic
        self._fed: dict[str, _Place] = {}  # where to go on feeding
        self._short: set[str] = set()  # batches the tenant's quota leaves no room for
        self._collected: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._swept = self._swept_orphans = float("-inf")

    def look_at(self, batch_id: str) -> None:
        """Something is to be done about this batch, now."""
        self._due.pop(batch_id, None)
        self.wake()

    def round(self) -> None:
        """Advance every batch until each waits for something, and forget old files."""
        try:
            self._adopt()
            looked = time.monotonic()
            while self._work:
                for tenant in list(self._work):
                    self._turn(tenant)
                if time.monotonic() > looked + PAUSE:
                    self.hold()
                    self._adopt()
                    looked = time.monotonic()
        finally:
            self._work.clear()  # what they were at begins anew
        if time.monotonic() - self._swept > 60:
            self._files.sweep(self._batches.inputs_in_use())
            self._swept = time.monotonic()
        if time.monotonic() - self._swept_orphans > 3600:
            self._swept_orphans = time.monotonic()
            for _ in self._files.sweep_orphans({batch.id for batch in self._batches.open()}):
                self.hold()

    def _adopt(self) -> None:
        """Take up the batches that are due, those that have waited longest first."""
        running = {batch.id for queue in self._work.values() for batch, _ in queue}
        due = [(self._due.get(b.id, 0.0), b.created, b) for b in self._batches.open() if b.id not in running]
        for when, _, batch in sorted(due, key=itemgetter(0, 1)):
            if when > time.monotonic() or len(running) >= MOST_BESIDE:
                return
            if len(self._work.get(batch.tenant, ())) < BESIDE:
                self._work.setdefault(batch.tenant, deque()).append((batch, self._advance(batch)))
                running.add(batch.id)

    def _turn(self, tenant: str) -> None:
        """A slice of one of the tenant's batches."""
        queue = self._work[tenant]
        batch, steps = queue.popleft()
        self._slice = time.monotonic() + SLICE
        if self._safely(batch, steps):
            queue.append((batch, steps))
        elif not queue:
            del self._work[tenant]

    def _safely(self, batch: BatchDocument, steps: Iterator[None]) -> bool:
        """Whether there is more to do for it now."""
        try:
            next(steps)
            return True
        except StopIteration:
            self._failures.pop(batch.id, None)
        except (Deposed, Unreachable):
            raise
        except _Unfit as error:
            code, message = error.args
            self._end(batch, "failed", errors=[{"code": code, "message": message, "line": None, "param": None}])
        except FileNotFoundError:
            said = f"the input file {batch.input_file_id} is gone"
            self._end(batch, "failed", errors=[{"code": "no_file", "message": said, "line": None, "param": None}])
        except Exception:
            log.exception("batch_failed", batch=batch.id)
            self._due[batch.id] = time.monotonic() + 5.0
            self._failures[batch.id] = self._failures.get(batch.id, 0) + 1
            if self._failures[batch.id] == MOST_FAILURES:
                said = "an internal error; it is in the server's log"
                self._end(batch, "failed", errors=[{"code": "internal", "message": said, "line": None, "param": None}])
        return False

    def _sliced(self, items: Iterable[T]) -> Iterator[T | None]:
        """The items, and None where the slice is over: the caller is to yield then."""
        for item in items:
            if time.monotonic() > self._slice:
                yield None
            yield item

    # --- one batch

    def _advance(self, batch: BatchDocument) -> Iterator[None]:
        """What can be done for it now, a step at a time."""
        if batch.status in ENDED:  # we were stopped just then
            self._close(batch)
            return
        if batch.status == "validating":
            validated = yield from self._validate(batch)
            if validated is None:
                return
            batch = validated
        marks = self._marks(batch)
        if not marks:  # cancelled before its lines were looked at
            batch, marks = yield from self._unfed(batch)
        if batch.status in ("in_progress", "cancelling"):
            if UNFED in marks and batch.status == "in_progress" and self._ledger.now() < batch.expires:
                batch = yield from self._feed(batch, marks)
            batch = yield from self._look(batch, marks)
            overtime = self._ledger.now() > batch.expires + OVERTIME
            stopping = overtime or batch.status == "cancelling"
            if OPEN in marks and stopping:
                yield from self._stop(batch, marks)
                batch = yield from self._look(batch, marks, overdue=overtime and batch.status != "cancelling")
            if OPEN in marks or (UNFED in marks and not stopping):
                left = marks.count(OPEN)
                self._due[batch.id] = time.monotonic() + max(PAUSE, left / LOOKS)
                waiting = marks.count(SUCCEEDED) + marks.count(FAILED)
                since = time.monotonic() - self._collected.setdefault(batch.id, time.monotonic())
                old = since > self._settings.retention / 4 or batch.id in self._short
                if waiting > COLLECT_AT or (waiting and old):
                    yield from self._collect(batch, marks)
                return
        yield from self._finalize(batch, marks)

    def _marks(self, batch: BatchDocument) -> bytearray:
        with reaching(self._settings):
            return bytearray(self._ledger.client.get(f"{self._batches.marks_key}{batch.id}") or b"")  # type: ignore[arg-type]

    def _save(self, batch: BatchDocument, marks: bytearray, change: Callable[[BatchDocument], BatchDocument]) -> Any:
        """Write the marks and the counts they give."""
        with reaching(self._settings):
            self._ledger.client.set(f"{self._batches.marks_key}{batch.id}", bytes(marks))
        counts = {
            "completed": marks.count(SUCCEEDED) + marks.count(COLLECTED_SUCCEEDED),
            "failed": marks.count(REFUSED) + marks.count(FAILED) + marks.count(COLLECTED_FAILED),
        }
        return self._batches.shelf.change(batch.id, lambda b: change(b).model_copy(update=counts)) or batch

    # --- its lines

    def _input(self, batch: BatchDocument) -> FileDocument:
        file = self._files.shelf.get(batch.input_file_id, batch.tenant)
        if file is None:
            raise FileNotFoundError(batch.input_file_id)
        return file

    def _read(self, batch: BatchDocument) -> Iterator[lines.Line | lines.BadLine]:
        """Its lines in order, each time the same."""
        with self._files.read(self._input(batch)) as content:
            for line in lines.read(lines.texts(content)):
                yield self._fit(batch, line)

    @staticmethod
    def _fit(batch: BatchDocument, line: lines.Line | lines.BadLine) -> lines.Line | lines.BadLine:
        if isinstance(line, lines.Line) and line.url != batch.endpoint:
            reason = f"url: {line.url!r} is not the batch's endpoint, {batch.endpoint}"
            return lines.BadLine(line.number, line.custom_id, reason)
        return line

    def _raw(self, batch: BatchDocument, start: _Place = (0, 0, 0)) -> Iterator[tuple[int, int, int, str]]:
        """The index, number, place and text of each line that is not empty."""
        index, number, place = start
        with self._files.read(self._input(batch)) as content:
            if place:
                content.seek(place)
            for text in lines.texts(content):
                number += 1
                if text.strip():
                    yield index, number, place, text
                    index += 1
                place = content.tell()

    def _count(self, batch: BatchDocument) -> Generator[None, None, int]:
        most, found = self._settings.api_batch_lines, 0
        for line in self._sliced(self._raw(batch)):
            if line is None:
                yield
                continue
            found += 1
            if found > most:
                raise _Unfit("too_many_lines", f"more than {most} lines")
        if not found:
            raise _Unfit("empty_file", "the input file has no lines")
        return found

    def _validate(self, batch: BatchDocument) -> Generator[None, None, BatchDocument | None]:
        """Judge every line, and submit good ones as long as there is room. None where there is nothing more to do."""
        total = yield from self._count(batch)
        marks = bytearray([UNFED]) * total
        shown: list[dict[str, Any]] = []
        feeder = _Feeder()
        with self._scratch() as refused:
            index = -1
            for line in self._sliced(self._read(batch)):
                if line is None:
                    yield
                    continue
                index += 1
                if index % 1000 == 0:
                    self.hold()
                    now = self._ledger.now()
                    current = self._batches.shelf.get(batch.id)
                    if current is None or current.status != "validating":
                        break  # cancelled meanwhile: the rest was never there
                spec = self._judge(batch, line, now)
                if isinstance(spec, TaskSpec):
                    if feeder.add(index, spec):
                        self._submit(batch, marks, feeder)
                    continue
                marks[index] = REFUSED
                _write(refused, lines.error_line(spec))
                if len(shown) < SHOWN_ERRORS:
                    said = f"line {spec.number}: {spec.reason}"
                    param = spec.reason.partition(":")[0] if ": " in spec.reason else None
                    shown.append({"code": "invalid_request", "message": said, "line": spec.number, "param": param})
            self._submit(batch, marks, feeder)
            if marks.count(REFUSED):
                self._put(self._part(batch, "err", 0), refused)
        now = self._ledger.now()

        def begin(b: BatchDocument) -> BatchDocument:
            known = b.model_copy(update={"total": total, "errors": shown, "parts": 1})
            return known.entered("in_progress", now) if b.status == "validating" else known

        begun: BatchDocument = self._save(batch, marks, begin)
        log.info("batch_validated", batch=batch.id, lines=total, refused=marks.count(REFUSED))
        if marks.count(REFUSED) == total:
            yield from self._finalize(begun, marks, failed=True)
            return None
        return begun

    def _feed(self, batch: BatchDocument, marks: bytearray) -> Generator[None, None, BatchDocument]:
        """Submit those of the good lines that there was no room for yet, as long as there is."""
        before = marks.count(UNFED)
        now = self._ledger.now()
        feeder = _Feeder()
        self.hold()
        for line in self._sliced(self._raw(batch, self._fed.get(batch.id, (0, 0, 0)))):
            if line is None:
                yield
                continue
            index, number, place, text = line
            if marks[index] != UNFED:
                continue
            if not feeder.waiting:
                self._fed[batch.id] = (index, number - 1, place)  # should these not be taken
            spec = self._judge(batch, self._fit(batch, lines.read_one(number, text)), now)
            if not isinstance(spec, TaskSpec):  # it was good when it was judged, and is no more: a model has gone
                marks[index] = FAILED
                continue
            if feeder.add(index, spec):
                self._submit(batch, marks, feeder)
                self.hold()
            if feeder.full:
                break
        self._submit(batch, marks, feeder)
        if marks.count(UNFED) == before:
            return batch
        fed: BatchDocument = self._save(batch, marks, lambda b: b)
        return fed

    def _submit(self, batch: BatchDocument, marks: bytearray, feeder: _Feeder) -> None:
        """Submit what waits in the feeder as far as there is room."""
        waiting = feeder.take()
        if not waiting:
            return
        size, room = 0, self._settings.quota(batch.tenant).task_bytes - self._ledger.stored_bytes([batch.tenant])[0]
        fitting: list[tuple[int, str, TaskSpec]] = []
        for index, spec in waiting:
            size += weight(spec)
            if size > room:
                break
            fitting.append((index, _task_id(batch, index), spec))
        if short := len(fitting) < len(waiting):
            self._short.add(batch.id)
        else:
            self._short.discard(batch.id)
        key = self._keys.get(batch.key) if batch.key is not None else None
        if key is not None and fitting:
            del fitting[self._keys.admit(key, {task_id: spec.deadline for _, task_id, spec in fitting}) :]
        self._ledger.submit((task_id, spec) for _, task_id, spec in fitting)
        for index, _, _ in fitting:
            marks[index] = OPEN
        feeder.full = short or len(fitting) < len(waiting)

    def _unfed(self, batch: BatchDocument) -> Generator[None, None, tuple[BatchDocument, bytearray]]:
        """A batch that was cancelled before it was fed, or half-way and we were stopped then: no line is known bad."""
        total = yield from self._count(batch)
        marks = bytearray(total)
        return self._save(batch, marks, lambda b: b.model_copy(update={"total": total, "parts": 1})), marks

    def _judge(self, batch: BatchDocument, line: lines.Line | lines.BadLine, now: float) -> TaskSpec | lines.BadLine:
        if isinstance(line, lines.BadLine):
            return line
        fields = dict(line.fields)
        left = max(0.001, batch.expires - now)
        try:
            deadline = fields.get("deadline")
            if isinstance(deadline, str):
                deadline = seconds_left(deadline, now)
            if deadline is None:
                fields["deadline"] = left
            else:
                fields["deadline"] = min(deadline, left) if isinstance(deadline, int | float) else deadline
            return self._validator.accept({**fields, "tenant": batch.tenant}, max_value=batch.max_value)
        except InvalidTask as error:
            return lines.BadLine(line.number, line.custom_id, str(error))

    # --- its tasks

    def _stop(self, batch: BatchDocument, marks: bytearray) -> Iterator[None]:
        for some in _pieces((n for n, mark in enumerate(marks) if mark == OPEN), 500):
            self.hold()
            self._ledger.cancel_many([_task_id(batch, n) for n in some])
            yield

    def _look(
        self, batch: BatchDocument, marks: bytearray, *, overdue: bool = False
    ) -> Generator[None, None, BatchDocument]:
        """Mark what has ended since the last look."""
        before = marks.count(OPEN)
        for some in _pieces((n for n, mark in enumerate(marks) if mark == OPEN), 1000):
            self.hold()
            states = self._ledger.states([_task_id(batch, n) for n in some])
            for number, state in zip(some, states, strict=True):
                if state is None or state.final:  # none: never submitted, or forgotten before it was collected
                    marks[number] = SUCCEEDED if state is State.SUCCEEDED else FAILED
            if batch.key is not None:
                self._keys.release(batch.key, [_task_id(batch, n) for n in some if marks[n] != OPEN])
            yield
        if marks.count(OPEN) == before:
            return batch
        looked: BatchDocument = self._save(
            batch, marks, lambda b: b.model_copy(update={"overdue": b.overdue or overdue})
        )
        return looked

    # --- its results

    def _collect(
        self, batch: BatchDocument, marks: bytearray, *, last: bool = False
    ) -> Generator[None, None, BatchDocument]:
        """Write what has ended, and is not yet written, as one more part of each file; the last time also what was
        never submitted."""
        wanted = (SUCCEEDED, FAILED, UNFED) if last else (SUCCEEDED, FAILED)
        overdue = False
        with self._scratch() as done, self._scratch() as failed:
            some: list[tuple[int, lines.Line | lines.BadLine]] = []
            size = 0
            for line in self._sliced(self._raw(batch)):
                if line is None:
                    yield
                    continue
                index, number, _, text = line
                if marks[index] not in wanted:
                    continue
                some.append((index, self._fit(batch, lines.read_one(number, text))))
                size += len(text)
                if len(some) >= FETCH or size > FEED_BYTES:
                    overdue |= self._results(batch, marks, some, done, failed)
                    some, size = [], 0
            overdue |= self._results(batch, marks, some, done, failed)
            for name, content in (("out", done), ("err", failed)):
                if content.tell():
                    self._put(self._part(batch, name, batch.parts), content)
        collected = [n for n, mark in enumerate(marks) if mark in wanted]
        for n in collected:
            marks[n] = COLLECTED_SUCCEEDED if marks[n] == SUCCEEDED else COLLECTED_FAILED
        self._collected[batch.id] = time.monotonic()
        update = {"parts": batch.parts + 1, "overdue": batch.overdue or overdue}
        saved: BatchDocument = self._save(batch, marks, lambda b: b.model_copy(update=update))
        if batch.id in self._short:  # their room is needed, and what came of them is written
            for ids in _pieces((_task_id(batch, n) for n in collected), 500):
                self.hold()
                self._ledger.forget_many(ids)
                yield
        return saved

    def _results(
        self,
        batch: BatchDocument,
        marks: bytearray,
        some: list[tuple[int, lines.Line | lines.BadLine]],
        done: IO[bytes],
        failed: IO[bytes],
    ) -> bool:
        """Write the results of these lines; whether the batch's window was over for any."""
        if not some:
            return False
        self.hold()
        overdue = False
        results = self._ledger.results([_task_id(batch, n) for n, _ in some])
        for (index, line), result in zip(some, results, strict=True):
            if result is None and marks[index] == FAILED and "cancelling" not in batch.times:
                judged = self._judge(batch, line, batch.created)  # perhaps there was never a task
                line = judged if isinstance(judged, lines.BadLine) else line  # noqa: PLW2901
            if isinstance(line, lines.BadLine):
                _write(failed, lines.error_line(line))
                continue
            if result is not None and result.state is State.SUCCEEDED:
                _write(done, lines.output_line(line, result, batch.created))
                continue
            entry = lines.output_line(line, result, batch.created) if result else _lost(line)
            state, reason = (result.state, result.reason) if result else (None, None)
            error = self._ended_with_batch(batch, line, state, reason)
            if error is None and marks[index] == UNFED:
                error = _expired("the limits of its key and tenant left no room for it")
            if error:
                entry["error"] = error
                overdue = overdue or error["code"] == "batch_expired"
            _write(failed, entry)
        return overdue

    @staticmethod
    def _ended_with_batch(
        batch: BatchDocument, line: lines.Line, state: State | None, reason: str | None
    ) -> dict[str, str] | None:
        """The error of a line whose batch did not give it the time."""
        if state in (State.CANCELLED, None) and "cancelling" in batch.times:
            return {"code": "batch_cancelled", "message": "the batch was cancelled before this request was done"}
        by_window = state in (State.EXPIRED, State.REJECTED) and "deadline" not in line.fields
        if by_window or (state is State.CANCELLED and batch.overdue):
            return _expired(reason)
        return None

    def _finalize(self, batch: BatchDocument, marks: bytearray, *, failed: bool = False) -> Iterator[None]:
        now = self._ledger.now()
        if not failed:
            entered = self._batches.shelf.change(
                batch.id, lambda b: b.entered("finalizing", now) if b.status == "in_progress" else None
            )
            batch = yield from self._collect(entered or batch, marks, last=True)
        made = {}
        for name, field, suffix in (("out", "output_file_id", "output"), ("err", "error_file_id", "error")):
            parts = [p for n in range(batch.parts) if self._files.exists(p := self._part(batch, name, n))]
            if parts:
                contents = (self._files.open(p) for p in parts)
                kept = self._files.keep(
                    batch.tenant,
                    f"{batch.id}_{suffix}.jsonl",
                    "batch_output",
                    contents,
                    lasts=batch.output_lasts,
                    identity=f"file-{batch.id.removeprefix('batch_')}-{suffix}",
                )
                made[field] = kept.id
        cancelled = "cancelling" in batch.times
        status = "failed" if failed else "cancelled" if cancelled else "expired" if batch.overdue else "completed"
        self._end(batch, status, **made)

    def _end(self, batch: BatchDocument, status: Any, **changes: Any) -> None:
        now = self._ledger.now()
        ended = self._batches.shelf.change(
            batch.id, lambda b: b.entered(status, now, **changes), keep=self._settings.api_file_retention
        )
        log.info("batch_ended", batch=batch.id, status=status)
        self._close(ended or batch)

    def _close(self, batch: BatchDocument) -> None:
        """Tell of a batch that has ended, and tidy up after it."""
        try:
            self._announce(batch)
        except Unreachable:
            raise
        except Exception:  # it has ended all the same
            log.exception("batch_untold", batch=batch.id)
        for name in ("out", "err"):
            for number in range(batch.parts):
                self._files.discard(self._part(batch, name, number))
        self._batches.close(batch)
        for remembered in (self._due, self._collected, self._failures, self._fed):
            remembered.pop(batch.id, None)
        self._short.discard(batch.id)

    # --- parts

    def _part(self, batch: BatchDocument, name: str, number: int) -> str:
        return self._files.path(batch.tenant, f"{batch.id}.{name}.{number}")

    def _put(self, path: str, content: IO[bytes]) -> None:
        content.seek(0)
        self._files.write(path, [content])

    @staticmethod
    def _scratch() -> IO[bytes]:
        return tempfile.TemporaryFile()


def _task_id(batch: BatchDocument, number: int) -> str:
    return f"{batch.id}-{number:05d}"


def _pieces(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while piece := list(islice(items, size)):
        yield piece


def _write(target: IO[bytes], entry: dict[str, Any]) -> None:
    target.write(json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n")


def _expired(reason: str | None) -> dict[str, str]:
    message = "this request could not be done before the completion window was over"
    return {"code": "batch_expired", "message": f"{message}: {reason}" if reason else message}


def _lost(line: lines.Line) -> dict[str, Any]:
    message = "its result was forgotten before it could be collected (PERLLM_RETENTION)"
    return {"id": None, "custom_id": line.custom_id, "response": None, "error": {"code": "lost", "message": message}}
