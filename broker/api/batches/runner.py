"""Runs batches: submits their lines, watches the tasks, collects the results.

Batches run side by side. Each works for a few milliseconds at a time, tenants in turn and each tenant's batches in
turn, so that no batch waits for all lines of another. Lines are submitted as the limits of the batch's key and the
tenant's quota leave room for them, the rest as earlier ones end.

One thread of one API process does it at a time, under a lease. Every step may be repeated after a crash: a line's task
has an id made of the batch's and the line's number, and a part of the results is written before its lines are marked.
Results are collected while the ledger still holds them, so a batch may last longer than PERLLM_RETENTION. Nothing is
held in memory but a byte per line and the digests of `custom_id`s.
"""

from __future__ import annotations

import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from operator import itemgetter
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
from perllm.broker.api.leased_worker import ROUND_PAUSE, LeasedWorker, LeaseLost
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.messages import State, TaskSpec
from perllm.broker.openai.batch_file import BadLine, Line, error_line

#: Batches of one tenant, and of all, that are worked on at once.
TENANT_CONCURRENCY, CONCURRENCY = 2, 32
#: Times in a row that a batch may meet a bug of ours before it is given up, and seconds before the next try.
MAX_FAILURES, FAILURE_PAUSE = 3, 5.0
#: States of tasks asked for per s: a large batch is looked at less often.
LOOKUPS_PER_S = 5000
#: Seconds after its window that a batch's tasks are cancelled here, in case no scheduler ends them.
OVERTIME = 5.0
#: Uncollected results at which some are collected before the end, and results fetched at once.
COLLECT_AT, FETCH = 10_000, 100
#: Bad lines shown in the batch itself; all are in its error file.
SHOWN_ERRORS = 100
#: Seconds between removals of expired files, and of orphaned content.
EXPIRY_PERIOD, ORPHAN_PERIOD = 60.0, 3600.0

log = structlog.get_logger(__name__)
T = TypeVar("T")
OnEnd = Callable[[BatchDocument], object]


class _CannotRun(Exception):
    """The batch cannot be run at all: (code, message)."""


class BatchRunner(LeasedWorker):
    """`on_end` is called at every batch's end, once or more."""

    def __init__(
        self,
        settings: ApiSettings,
        store: ApiStore,
        ledger: Ledger,
        files: Files,
        batches: Batches,
        keys: Keys,
        on_end: OnEnd,
    ) -> None:
        super().__init__(store, "batches")
        self._settings, self._ledger, self._files, self._batches = settings, ledger, files, batches
        self._keys, self._on_end = keys, on_end
        self._reader = LineReader(files)
        self._submitter = LineSubmitter(settings, ledger, keys)
        self._results = ResultFiles(ledger, files, self._submitter)
        self._working: OrderedDict[str, deque[tuple[BatchDocument, Iterator[None]]]] = OrderedDict()  # by tenant
        self._slice = TimeSlice()
        self._progress: dict[str, Progress] = {}
        self._expired_at = self._orphans_at = float("-inf")  # when files were last removed

    def look_at(self, batch_id: str) -> None:
        """There is something to do about this batch, now."""
        if (progress := self._progress.get(batch_id)) is not None:
            progress.due = 0.0
        self.wake()

    # --- batches side by side

    def round(self) -> None:
        """Work on every batch until each waits for something, and remove old files."""
        try:
            self._adopt()
            adopted = time.monotonic()
            while self._working:
                for tenant in list(self._working):
                    self._work(tenant)
                if time.monotonic() > adopted + ROUND_PAUSE:
                    self.renew()
                    self._adopt()
                    adopted = time.monotonic()
        finally:
            self._working.clear()  # what was begun begins anew
        if time.monotonic() - self._expired_at > EXPIRY_PERIOD:
            self._files.sweep(self._batches.inputs_in_use())
            self._expired_at = time.monotonic()
        if time.monotonic() - self._orphans_at > ORPHAN_PERIOD:
            self._orphans_at = time.monotonic()
            for _ in self._files.sweep_orphans({batch.id for batch in self._batches.open()}):
                self.renew()

    def _adopt(self) -> None:
        """Begin to work on the batches that are due, those that have waited longest first."""
        working = {batch.id for queue in self._working.values() for batch, _ in queue}
        unfinished = self._batches.open()
        self._progress = {b.id: self._of(b) for b in unfinished}
        waiting = [(self._of(b).due, b.created, b) for b in unfinished if b.id not in working]
        for due, _, batch in sorted(waiting, key=itemgetter(0, 1)):
            if due > time.monotonic() or len(working) >= CONCURRENCY:
                return
            if len(self._working.get(batch.tenant, ())) < TENANT_CONCURRENCY:
                self._working.setdefault(batch.tenant, deque()).append((batch, self._advance(batch)))
                working.add(batch.id)

    def _of(self, batch: BatchDocument) -> Progress:
        return self._progress.setdefault(batch.id, Progress())

    def _work(self, tenant: str) -> None:
        """A slice of one of the tenant's batches."""
        queue = self._working[tenant]
        batch, steps = queue.popleft()
        self._slice.begin()
        if self._step(batch, steps):
            queue.append((batch, steps))
        elif not queue:
            del self._working[tenant]

    def _step(self, batch: BatchDocument, steps: Iterator[None]) -> bool:
        """Whether there is more to do for the batch now. Whatever goes wrong with it is no other's concern."""
        try:
            next(steps)
            return True
        except StopIteration:
            self._of(batch).failures = 0
        except (LeaseLost, Unreachable):
            raise
        except _CannotRun as error:
            self._fail(batch, *error.args)
        except FileNotFoundError:
            self._fail(batch, "no_file", f"the input file {batch.input_file_id} is gone")
        except Exception:
            log.exception("batch_failed", batch=batch.id)
            progress = self._of(batch)
            progress.due = time.monotonic() + FAILURE_PAUSE
            progress.failures += 1
            if progress.failures == MAX_FAILURES:
                self._fail(batch, "internal", "an internal error; it is in the server's log")
        return False

    # --- one batch

    def _advance(self, batch: BatchDocument) -> Iterator[None]:
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
        for line in self._slice.iterate(self._reader.raw(batch)):
            if line is None:
                yield
                continue
            found += 1
            if found > limit:
                raise _CannotRun("too_many_lines", f"more than {limit} lines")
        if not found:
            raise _CannotRun("empty_file", "the input file has no lines")
        return found

    def _validate(self, batch: BatchDocument) -> Generator[None, None, BatchDocument | None]:
        """Check every line, and submit valid ones as long as there is room. None where there is nothing more to do."""
        total = yield from self._count(batch)
        marks = bytearray([UNSUBMITTED]) * total
        errors: list[dict[str, Any]] = []
        buffer = SubmitBuffer()
        with tempfile.TemporaryFile() as refused:
            row = -1
            for line in self._slice.iterate(self._reader.parsed(batch)):
                if line is None:
                    yield
                    continue
                row += 1
                if row % 1000 == 0:
                    self.renew()
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
        progress, buffer = self._of(batch), SubmitBuffer()
        self.renew()
        for raw in self._slice.iterate(self._reader.raw(batch, progress.unsubmitted_from)):
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
                self.renew()
            if buffer.full:
                break
        self._submit(batch, marks, buffer)
        return batch if marks.count(UNSUBMITTED) == before else self._save(batch, marks)

    def _submit(self, batch: BatchDocument, marks: bytearray, buffer: SubmitBuffer) -> None:
        self._submitter.submit(batch, marks, buffer, self._of(batch))

    def _mark_unvalidated(self, batch: BatchDocument) -> Generator[None, None, tuple[BatchDocument, bytearray]]:
        """Marks for a batch that was cancelled before it was validated, or half-way when a runner was stopped: any line
        may have been submitted, none is known to be bad."""
        total = yield from self._count(batch)
        marks = bytearray([OPEN]) * total
        return self._save(batch, marks, total=total, parts=1), marks

    # --- its tasks

    def _cancel_tasks(self, batch: BatchDocument, marks: bytearray) -> Iterator[None]:
        for some in _chunks((n for n, mark in enumerate(marks) if mark == OPEN), 500):
            self.renew()
            self._ledger.cancel_many([task_id(batch, n) for n in some])
            yield

    def _look_up(
        self, batch: BatchDocument, marks: bytearray, *, overdue: bool = False
    ) -> Generator[None, None, BatchDocument]:
        """Mark the lines of which the tasks have ended."""
        before = marks.count(OPEN)
        for some in _chunks((n for n, mark in enumerate(marks) if mark == OPEN), 1000):
            self.renew()
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
        progress = self._of(batch)
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
                self.renew()
                return self._results.write(batch, marks, some, succeeded, failed)

            some: list[tuple[int, Line | BadLine]] = []
            size = 0
            for raw in self._slice.iterate(self._reader.raw(batch)):
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
        progress = self._of(batch)
        progress.collected = time.monotonic()
        saved = self._save(batch, marks, parts=batch.parts + 1, overdue=batch.overdue or overdue)
        if progress.no_room:  # the tasks' room is needed, and their results are written
            for ids in _chunks((task_id(batch, n) for n in collected), 500):
                self.renew()
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

    def _fail(self, batch: BatchDocument, code: str, message: str) -> None:
        self._end(batch, "failed", errors=[{"code": code, "message": message, "line": None, "param": None}])

    def _end(self, batch: BatchDocument, status: Status, **changes: Any) -> None:
        now = self._store.now()
        ended = self._batches.documents.change(
            batch.id, lambda b: b.with_status(status, now, **changes), lasts=self._settings.api_file_retention
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
