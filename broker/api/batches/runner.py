"""Runs batches: submits their lines, watches the tasks, collects the results.

One thread of one API process does it at a time, under a lease. Every step may be repeated after a crash: a line's task
has an id made of the batch's and the line's number, and a part of the results is written before its lines are marked.
Results are collected while the ledger still holds them, so a batch may last longer than PERLLM_RETENTION. Nothing is
held in memory but a byte per line and the digests of `custom_id`s.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import IO, Any, TypeVar

import structlog

from perllm.broker.api.batches.store import ENDED, BatchDocument, Batches
from perllm.broker.api.files.store import FileDocument, Files
from perllm.broker.api.leased_worker import PAUSE, Deposed, LeasedWorker
from perllm.broker.connection import reaching
from perllm.broker.errors import InvalidTask, PerLLMError
from perllm.broker.ledger import Ledger
from perllm.broker.messages import State, TaskSpec
from perllm.broker.openai import batch_file as lines
from perllm.broker.openai.translation import seconds_left
from perllm.broker.settings import Settings
from perllm.broker.validation import Door

#: What became of a line: nothing yet, refused at the door, succeeded, ended without a result; the last two, collected.
OPEN, REFUSED, SUCCEEDED, FAILED, COLLECTED_SUCCEEDED, COLLECTED_FAILED = range(6)
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
#: Longest line, bytes.
MAX_LINE = 8 << 20

log = structlog.get_logger(__name__)
T = TypeVar("T")
Announce = Callable[[BatchDocument], object]


class _Unfit(Exception):
    """The batch cannot be run at all: (code, message)."""


class BatchRunner(LeasedWorker):
    """`announce` hears of every batch's end, once or more."""

    def __init__(self, settings: Settings, ledger: Ledger, files: Files, batches: Batches, announce: Announce) -> None:
        super().__init__(settings, ledger, "batches")
        self._files, self._batches, self._announce = files, batches, announce
        self._door = Door(settings, ledger)
        self._due: dict[str, float] = {}  # when each batch is to be looked at, monotonic
        self._collected: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._swept = float("-inf")

    def look_at(self, batch_id: str) -> None:
        """Something is to be done about this batch, now."""
        self._due.pop(batch_id, None)
        self.wake()

    def round(self) -> None:
        """Advance every batch, and forget old files."""
        for batch in self._batches.open():
            if time.monotonic() >= self._due.get(batch.id, 0.0):
                self._safely(batch)
        if time.monotonic() - self._swept > 60:
            self._files.sweep(self._batches.inputs_in_use())
            self._swept = time.monotonic()

    def _safely(self, batch: BatchDocument) -> None:
        try:
            self._advance(batch)
        except (Deposed, PerLLMError):
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
        else:
            self._failures.pop(batch.id, None)

    # --- one batch

    def _advance(self, batch: BatchDocument) -> None:
        if batch.status in ENDED:  # we were stopped just then
            self._close(batch)
            return
        if batch.status == "validating":
            fed = self._feed(batch)
            if fed is None:
                return
            batch = fed
        marks = self._marks(batch)
        if not marks:  # cancelled before its lines were looked at
            batch, marks = self._unfed(batch)
        if batch.status in ("in_progress", "cancelling"):
            batch = self._look(batch, marks)
            overtime = self._ledger.now() > batch.expires + OVERTIME
            if OPEN in marks and (batch.status == "cancelling" or overtime):
                self._stop(batch, marks)
                batch = self._look(batch, marks, overdue=overtime and batch.status != "cancelling")
            if OPEN in marks:
                left = marks.count(OPEN)
                self._due[batch.id] = time.monotonic() + max(PAUSE, left / LOOKS)
                waiting = marks.count(SUCCEEDED) + marks.count(FAILED)
                since = time.monotonic() - self._collected.setdefault(batch.id, time.monotonic())
                if waiting > COLLECT_AT or (waiting and since > self._settings.retention / 4):
                    self._collect(batch, marks)
                return
        self._finalize(batch, marks)

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
            for line in lines.read(_text(content)):
                if isinstance(line, lines.Line) and line.url != batch.endpoint:
                    yield lines.BadLine(
                        line.number, line.custom_id, f"url: {line.url!r} is not the batch's endpoint, {batch.endpoint}"
                    )
                else:
                    yield line

    def _count(self, batch: BatchDocument) -> int:
        most, found = self._settings.api_batch_lines, 0
        with self._files.read(self._input(batch)) as content:
            for text in _text(content):
                found += bool(text.strip())
                if found > most:
                    raise _Unfit("too_many_lines", f"more than {most} lines")
        if not found:
            raise _Unfit("empty_file", "the input file has no lines")
        return found

    def _feed(self, batch: BatchDocument) -> BatchDocument | None:
        """Submit every good line. None where there is nothing more to do now."""
        total = self._count(batch)
        marks = bytearray(total)
        shown: list[dict[str, Any]] = []
        with self._scratch() as refused:
            self._ledger.submit(self._good(batch, marks, shown, refused))
            if marks.count(REFUSED):
                self._put(self._part(batch, "err", 0), refused)
        now = self._ledger.now()

        def begin(b: BatchDocument) -> BatchDocument:
            known = b.model_copy(update={"total": total, "errors": shown, "parts": 1})
            return known.entered("in_progress", now) if b.status == "validating" else known

        fed: BatchDocument = self._save(batch, marks, begin)
        log.info("batch_fed", batch=batch.id, lines=total, refused=marks.count(REFUSED))
        if marks.count(REFUSED) == total:
            self._finalize(fed, marks, failed=True)
            return None
        return fed

    def _unfed(self, batch: BatchDocument) -> tuple[BatchDocument, bytearray]:
        """A batch that was cancelled before it was fed, or half-way and we were stopped then: no line is known bad."""
        total = self._count(batch)
        marks = bytearray(total)
        return self._save(batch, marks, lambda b: b.model_copy(update={"total": total, "parts": 1})), marks

    def _good(
        self, batch: BatchDocument, marks: bytearray, shown: list[dict[str, Any]], refused: IO[bytes]
    ) -> Iterator[tuple[str, TaskSpec]]:
        for number, line in enumerate(self._read(batch)):
            if number % 1000 == 0:
                self.hold()
                now = self._ledger.now()
                current = self._batches.shelf.get(batch.id)
                if current is None or current.status != "validating":
                    return  # cancelled meanwhile: the rest was never there
            spec = self._judge(batch, line, now)
            if isinstance(spec, TaskSpec):
                yield _task_id(batch, number), spec
                continue
            marks[number] = REFUSED
            _write(refused, lines.error_line(spec))
            if len(shown) < SHOWN_ERRORS:
                said = f"line {spec.number}: {spec.reason}"
                param = spec.reason.partition(":")[0] if ": " in spec.reason else None
                shown.append({"code": "invalid_request", "message": said, "line": spec.number, "param": param})

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
            return self._door.accept({**fields, "tenant": batch.tenant})
        except InvalidTask as error:
            return lines.BadLine(line.number, line.custom_id, str(error))

    # --- its tasks

    def _stop(self, batch: BatchDocument, marks: bytearray) -> None:
        for some in _pieces((n for n, mark in enumerate(marks) if mark == OPEN), 500):
            self.hold()
            self._ledger.cancel_many([_task_id(batch, n) for n in some])

    def _look(self, batch: BatchDocument, marks: bytearray, *, overdue: bool = False) -> BatchDocument:
        """Mark what has ended since the last look."""
        before = marks.count(OPEN)
        for some in _pieces((n for n, mark in enumerate(marks) if mark == OPEN), 1000):
            self.hold()
            states = self._ledger.states([_task_id(batch, n) for n in some])
            for number, state in zip(some, states, strict=True):
                if state is None or state.final:  # none: never submitted, or forgotten before it was collected
                    marks[number] = SUCCEEDED if state is State.SUCCEEDED else FAILED
        if marks.count(OPEN) == before:
            return batch
        looked: BatchDocument = self._save(
            batch, marks, lambda b: b.model_copy(update={"overdue": b.overdue or overdue})
        )
        return looked

    # --- its results

    def _collect(self, batch: BatchDocument, marks: bytearray) -> BatchDocument:
        """Write what has ended, and is not yet written, as one more part of each file."""
        overdue = False
        with self._scratch() as done, self._scratch() as failed:
            numbered = ((n, line) for n, line in enumerate(self._read(batch)) if marks[n] in (SUCCEEDED, FAILED))
            for some in _pieces(numbered, FETCH):
                self.hold()
                results = self._ledger.results([_task_id(batch, n) for n, _ in some])
                for (_, line), result in zip(some, results, strict=True):
                    if isinstance(line, lines.BadLine):
                        _write(failed, lines.error_line(line))
                        continue
                    if result is not None and result.state is State.SUCCEEDED:
                        _write(done, lines.output_line(line, result, batch.created))
                        continue
                    entry = lines.output_line(line, result, batch.created) if result else _lost(line)
                    state, reason = (result.state, result.reason) if result else (None, None)
                    if error := self._ended_with_batch(batch, line, state, reason):
                        entry["error"] = error
                        overdue = overdue or error["code"] == "batch_expired"
                    _write(failed, entry)
            for name, content in (("out", done), ("err", failed)):
                if content.tell():
                    self._put(self._part(batch, name, batch.parts), content)
        for number, mark in enumerate(marks):
            if mark in (SUCCEEDED, FAILED):
                marks[number] = COLLECTED_SUCCEEDED if mark == SUCCEEDED else COLLECTED_FAILED
        self._collected[batch.id] = time.monotonic()
        update = {"parts": batch.parts + 1, "overdue": batch.overdue or overdue}
        collected: BatchDocument = self._save(batch, marks, lambda b: b.model_copy(update=update))
        return collected

    @staticmethod
    def _ended_with_batch(
        batch: BatchDocument, line: lines.Line, state: State | None, reason: str | None
    ) -> dict[str, str] | None:
        """The error of a line whose batch did not give it the time."""
        if state in (State.CANCELLED, None) and "cancelling" in batch.times:
            return {"code": "batch_cancelled", "message": "the batch was cancelled before this request was done"}
        by_window = state in (State.EXPIRED, State.REJECTED) and "deadline" not in line.fields
        if by_window or (state is State.CANCELLED and batch.overdue):
            message = "this request could not be done before the completion window was over"
            return {"code": "batch_expired", "message": f"{message}: {reason}" if reason else message}
        return None

    def _finalize(self, batch: BatchDocument, marks: bytearray, *, failed: bool = False) -> None:
        now = self._ledger.now()
        if not failed:
            entered = self._batches.shelf.change(
                batch.id, lambda b: b.entered("finalizing", now) if b.status == "in_progress" else None
            )
            batch = self._collect(entered or batch, marks)
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
        self._announce(batch)
        for name in ("out", "err"):
            for number in range(batch.parts):
                self._files.discard(self._part(batch, name, number))
        self._batches.close(batch)
        for remembered in (self._due, self._collected, self._failures):
            remembered.pop(batch.id, None)

    # --- parts

    def _part(self, batch: BatchDocument, name: str, number: int) -> str:
        return self._files.path(batch.tenant, f"{batch.id}.{name}.{number}")

    def _put(self, path: str, content: IO[bytes]) -> None:
        content.seek(0)
        with self._files.open(path, "wb") as target:
            while piece := content.read(1 << 20):
                target.write(piece)

    @staticmethod
    def _scratch() -> IO[bytes]:
        return tempfile.TemporaryFile()


def _task_id(batch: BatchDocument, number: int) -> str:
    return f"{batch.id}-{number:05d}"


def _text(content: IO[bytes]) -> Iterator[str]:
    """The file's lines. One that is too long or no UTF-8 becomes one that is no JSON, and says so in its place."""
    while raw := content.readline(MAX_LINE):
        if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
            while (rest := content.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            raw = b"(a line of more than %d bytes)" % MAX_LINE
        try:
            yield raw.decode()
        except UnicodeDecodeError:
            yield "(not UTF-8 text)"


def _pieces(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while piece := list(islice(items, size)):
        yield piece


def _write(target: IO[bytes], entry: dict[str, Any]) -> None:
    target.write(json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n")


def _lost(line: lines.Line) -> dict[str, Any]:
    message = "its result was forgotten before it could be collected (PERLLM_RETENTION)"
    return {"id": None, "custom_id": line.custom_id, "response": None, "error": {"code": "lost", "message": message}}
