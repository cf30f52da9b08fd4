"""One batch from its validation to its end, a step at a time.

Every step may be repeated after a crash: a line's task has an id made of the batch's and the line's number, and a part
of the results is written before its lines are marked. Results are collected while the ledger still holds them, so a
batch may last longer than PERLLM_RETENTION. Nothing is held in memory but a byte per line and the digests of
`custom_id`s.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import Any, TypeVar

import structlog

from perllm.broker.api.batches import lines
from perllm.broker.api.batches.lines import (
    COLLECTED_FAILED,
    COLLECTED_SUCCEEDED,
    FAILED,
    OPEN,
    REFUSED,
    SUCCEEDED,
    UNSUBMITTED,
    LineReader,
    task_id,
)
from perllm.broker.api.batches.progress import Progress, TimeSlice
from perllm.broker.api.batches.results import ERROR, OUTPUT, ResultFiles, write_entry
from perllm.broker.api.batches.store import ENDED, BatchDocument, Batches, Status
from perllm.broker.api.batches.submitter import GROUP_BYTES, LineSubmitter, SubmitBuffer
from perllm.broker.api.files.store import Files
from perllm.broker.api.keys import Keys
from perllm.broker.api.leased_worker import ROUND_PAUSE
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.messages import State, TaskSpec
from perllm.broker.openai.batch_file import BadLine, Line, error_line

#: States of tasks asked for per s: a large batch is looked at less often.
LOOKUPS_PER_S = 5000
#: Seconds after its window that a batch's tasks are cancelled here, in case no scheduler ends them.
OVERTIME = 5.0
#: Uncollected results at which some are collected before the end, and results fetched at once.
COLLECT_AT, FETCH = 10_000, 100
#: Bad lines shown in the batch itself; all are in its error file.
SHOWN_ERRORS = 100

log = structlog.get_logger(__name__)
T = TypeVar("T")
OnEnd = Callable[[BatchDocument], object]


class CannotRun(Exception):
    """The batch cannot be run at all: (code, message)."""


class BatchSteps:
    """What is done for a batch. `renew` is called every few seconds, and raises where another process is to go on;
    `on_end` at every batch's end, once or more. The steps yield where the time slice has ended."""

    def __init__(
        self,
        settings: ApiSettings,
        store: ApiStore,
        ledger: Ledger,
        files: Files,
        batches: Batches,
        keys: Keys,
        on_end: OnEnd,
        renew: Callable[[], None],
    ) -> None:
        self._settings, self._store, self._ledger, self._batches = settings, store, ledger, batches
        self._keys, self._on_end, self._renew = keys, on_end, renew
        self._reader = LineReader(files)
        self._submitter = LineSubmitter(settings, ledger, keys)
        self._results = ResultFiles(ledger, files, self._submitter, renew)
        self.slice = TimeSlice()
        self._progress: dict[str, Progress] = {}

    def progress(self, batch_id: str) -> Progress:
        """What is known of a batch beside what is stored."""
        return self._progress.setdefault(batch_id, Progress())

    def make_due(self, batch_id: str) -> None:
        """Let a batch wait no longer, if it does."""
        if (progress := self._progress.get(batch_id)) is not None:
            progress.due = 0.0

    def keep_only(self, batches: list[BatchDocument]) -> None:
        """Forget the progress of all other batches: they have ended."""
        self._progress = {batch.id: self.progress(batch.id) for batch in batches}

    def advance(self, batch: BatchDocument) -> Iterator[None]:
        """Do what can be done for a batch now, a slice at a time."""
        if batch.status in ENDED:  # a runner was stopped just then
            self._close(batch)
            return
        if batch.status == "validating":
            validated = yield from self._validate(batch)
            if validated is None:
                return
            batch = validated
        marks = self._batches.marks(batch)
        if not marks:  # cancelled before it was validated
            batch, marks = yield from self._mark_unvalidated(batch)
        if batch.status in ("in_progress", "cancelling"):
            if UNSUBMITTED in marks and batch.status == "in_progress" and self._store.now() < batch.expires:
                batch = yield from self._submit_rest(batch, marks)
            batch = yield from self._look_up(batch, marks)
            overtime = self._store.now() > batch.expires + OVERTIME
            stopping = overtime or batch.status == "cancelling"
            if OPEN in marks and stopping:
                yield from self._cancel_tasks(batch, marks)
                batch = yield from self._look_up(batch, marks, overdue=overtime and batch.status != "cancelling")
            if OPEN in marks or (UNSUBMITTED in marks and not stopping):
                yield from self._wait(batch, marks)
                return
        yield from self._finalize(batch, marks)

    def _save(self, batch: BatchDocument, marks: bytearray, **changes: Any) -> BatchDocument:
        """Write the marks and the counts they give."""
        return self._change(batch, marks, lambda b: b.model_copy(update=changes))

    def _change(
        self, batch: BatchDocument, marks: bytearray, change: Callable[[BatchDocument], BatchDocument]
    ) -> BatchDocument:
        self._batches.save_marks(batch, marks)
        counts = {
            "completed": marks.count(SUCCEEDED) + marks.count(COLLECTED_SUCCEEDED),
            "failed": marks.count(REFUSED) + marks.count(FAILED) + marks.count(COLLECTED_FAILED),
        }
        changed = self._batches.documents.change(batch.id, lambda b: change(b).model_copy(update=counts))
        return changed or batch

    # --- its lines

    def _count(self, batch: BatchDocument) -> Generator[None, None, int]:
        limit, found = self._settings.api_batch_lines, 0
        for line in self.slice.iterate(self._reader.raw(batch)):
            if line is None:
                yield
                continue
            found += 1
            if found > limit:
                raise CannotRun("too_many_lines", f"more than {limit} lines")
        if not found:
            raise CannotRun("empty_file", "the input file has no lines")
        return found

    def _validate(self, batch: BatchDocument) -> Generator[None, None, BatchDocument | None]:
        """Check every line, and submit valid ones as long as there is room. None where there is nothing more to do."""
        total = yield from self._count(batch)
        marks = bytearray([UNSUBMITTED]) * total
        errors: list[dict[str, Any]] = []
        buffer = SubmitBuffer()
        with tempfile.TemporaryFile() as refused:
            row = -1
            for line in self.slice.iterate(self._reader.parsed(batch)):
                if line is None:
                    yield
                    continue
                row += 1
                if row % 1000 == 0:
                    self._renew()
                    now = self._store.now()
                    current = self._batches.documents.get(batch.id)
                    if current is None or current.status != "validating":
                        break  # cancelled meanwhile: the rest was never submitted
                checked = self._submitter.check(batch, line, now)
                if isinstance(checked, TaskSpec):
                    if buffer.add(row, checked):
                        self._submit(batch, marks, buffer)
                    continue
                marks[row] = REFUSED
                write_entry(refused, error_line(checked))
                if len(errors) < SHOWN_ERRORS:
                    errors.append(_error_shown(checked))
            self._submit(batch, marks, buffer)
            if marks.count(REFUSED):
                self._results.put_part(batch, ERROR, 0, refused)
        now = self._store.now()

        def begin(b: BatchDocument) -> BatchDocument:
            validated = b.model_copy(update={"total": total, "errors": errors, "parts": 1})
            return validated.with_status("in_progress", now) if b.status == "validating" else validated

        begun = self._change(batch, marks, begin)
        log.info("batch_validated", batch=batch.id, lines=total, refused=marks.count(REFUSED))
        if marks.count(REFUSED) == total:
            yield from self._finalize(begun, marks, failed=True)
            return None
        return begun

    def _submit_rest(self, batch: BatchDocument, marks: bytearray) -> Generator[None, None, BatchDocument]:
        """Submit those of the valid lines that there was no room for yet, as long as there is."""
        before = marks.count(UNSUBMITTED)
        now = self._store.now()
        progress, buffer = self.progress(batch.id), SubmitBuffer()
        self._renew()
        for raw in self.slice.iterate(self._reader.raw(batch, progress.unsubmitted_from)):
            if raw is None:
                yield
                continue
            if marks[raw.row] != UNSUBMITTED:
                continue
            if not buffer.lines:
                progress.unsubmitted_from = raw.position  # should there be no room for these
            checked = self._submitter.check(batch, lines.parse(batch, raw), now)
            if not isinstance(checked, TaskSpec):  # it was valid before and is no more: a model has gone
                marks[raw.row] = FAILED
                continue
            if buffer.add(raw.row, checked):
                self._submit(batch, marks, buffer)
                self._renew()
            if buffer.full:
                break
        self._submit(batch, marks, buffer)
        return batch if marks.count(UNSUBMITTED) == before else self._save(batch, marks)

    def _submit(self, batch: BatchDocument, marks: bytearray, buffer: SubmitBuffer) -> None:
        self._submitter.submit(batch, marks, buffer, self.progress(batch.id))

    def _mark_unvalidated(self, batch: BatchDocument) -> Generator[None, None, tuple[BatchDocument, bytearray]]:
        """Marks for a batch that was cancelled before it was validated, or half-way when a runner was stopped: any line
        may have been submitted, none is known to be bad."""
        total = yield from self._count(batch)
        marks = bytearray([OPEN]) * total
        return self._save(batch, marks, total=total, parts=1), marks

    # --- its tasks

    def _cancel_tasks(self, batch: BatchDocument, marks: bytearray) -> Iterator[None]:
        for some in _chunks((n for n, mark in enumerate(marks) if mark == OPEN), 500):
            self._renew()
            self._ledger.cancel_many([task_id(batch, n) for n in some])
            yield

    def _look_up(
        self, batch: BatchDocument, marks: bytearray, *, overdue: bool = False
    ) -> Generator[None, None, BatchDocument]:
        """Mark the lines of which the tasks have ended."""
        before = marks.count(OPEN)
        for some in _chunks((n for n, mark in enumerate(marks) if mark == OPEN), 1000):
            self._renew()
            states = self._ledger.states([task_id(batch, n) for n in some])
            for row, state in zip(some, states, strict=True):
                if state is None or state.final:  # None: never submitted, or forgotten before it was collected
                    marks[row] = SUCCEEDED if state is State.SUCCEEDED else FAILED
            if batch.key is not None:
                self._keys.release(batch.key, [task_id(batch, n) for n in some if marks[n] != OPEN])
            yield
        if marks.count(OPEN) == before:
            return batch
        return self._change(batch, marks, lambda b: b.model_copy(update={"overdue": b.overdue or overdue}))

    def _wait(self, batch: BatchDocument, marks: bytearray) -> Iterator[None]:
        """Decide when to look at it next. Collect results meanwhile where they are many or old, or room is short."""
        progress = self.progress(batch.id)
        progress.due = time.monotonic() + max(ROUND_PAUSE, marks.count(OPEN) / LOOKUPS_PER_S)
        uncollected = marks.count(SUCCEEDED) + marks.count(FAILED)
        if progress.collected is None:
            progress.collected = time.monotonic()
        old = time.monotonic() - progress.collected > self._settings.retention / 4
        if uncollected > COLLECT_AT or (uncollected and (old or progress.no_room)):
            yield from self._collect(batch, marks)

    # --- its results

    def _collect(
        self, batch: BatchDocument, marks: bytearray, *, last: bool = False
    ) -> Generator[None, None, BatchDocument]:
        """Write the results of lines that have ended and are not yet written as one more part of each file; the last
        time also of those never submitted."""
        wanted = (SUCCEEDED, FAILED, UNSUBMITTED) if last else (SUCCEEDED, FAILED)
        overdue = False
        with tempfile.TemporaryFile() as succeeded, tempfile.TemporaryFile() as failed:

            def write(some: list[tuple[int, Line | BadLine]]) -> bool:
                if not some:
                    return False
                self._renew()
                return self._results.write(batch, marks, some, succeeded, failed)

            some: list[tuple[int, Line | BadLine]] = []
            size = 0
            for raw in self.slice.iterate(self._reader.raw(batch)):
                if raw is None:
                    yield
                    continue
                if marks[raw.row] not in wanted:
                    continue
                some.append((raw.row, lines.parse(batch, raw)))
                size += len(raw.text)
                if len(some) >= FETCH or size > GROUP_BYTES:
                    overdue |= write(some)
                    some, size = [], 0
            overdue |= write(some)
            for kind, content in ((OUTPUT, succeeded), (ERROR, failed)):
                if content.tell():
                    self._results.put_part(batch, kind, batch.parts, content)
        collected = [n for n, mark in enumerate(marks) if mark in wanted]
        for n in collected:
            marks[n] = COLLECTED_SUCCEEDED if marks[n] == SUCCEEDED else COLLECTED_FAILED
        progress = self.progress(batch.id)
        progress.collected = time.monotonic()
        saved = self._save(batch, marks, parts=batch.parts + 1, overdue=batch.overdue or overdue)
        if progress.no_room:  # the tasks' room is needed, and their results are written
            for ids in _chunks((task_id(batch, n) for n in collected), 500):
                self._renew()
                self._ledger.forget_many(ids)
                yield
        return saved

    # --- its end

    def _finalize(self, batch: BatchDocument, marks: bytearray, *, failed: bool = False) -> Iterator[None]:
        now = self._store.now()
        if not failed:
            finalizing = self._batches.documents.change(
                batch.id, lambda b: b.with_status("finalizing", now) if b.status == "in_progress" else None
            )
            batch = yield from self._collect(finalizing or batch, marks, last=True)
        made = self._results.make_files(batch)
        status: Status = "expired" if batch.overdue else "completed"
        if "cancelling" in batch.times:
            status = "cancelled"
        self._end(batch, "failed" if failed else status, **made)

    def fail(self, batch: BatchDocument, code: str, message: str) -> None:
        """End a batch that cannot be run, or no further."""
        self._end(batch, "failed", errors=[{"code": code, "message": message, "line": None, "param": None}])

    def _end(self, batch: BatchDocument, status: Status, **changes: Any) -> None:
        now = self._store.now()
        ended = self._batches.documents.change(
            batch.id,
            lambda b: None if b.status in ENDED else b.with_status(status, now, **changes),  # another runner was first
            lasts=self._settings.api_file_retention,
        )
        log.info("batch_ended", batch=batch.id, status=status)
        self._close(ended or batch)

    def _close(self, batch: BatchDocument) -> None:
        """Report the end of a batch, and tidy up after it."""
        try:
            self._on_end(batch)
        except Unreachable:
            raise
        except Exception:  # it has ended all the same
            log.exception("batch_end_unreported", batch=batch.id)
        self._results.discard_parts(batch)
        self._batches.close(batch)
        self._progress.pop(batch.id, None)


def _error_shown(bad: BadLine) -> dict[str, Any]:
    param = bad.reason.partition(":")[0] if ": " in bad.reason else None
    message = f"line {bad.number}: {bad.reason}"
    return {"code": "invalid_request", "message": message, "line": bad.number, "param": param}


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk
