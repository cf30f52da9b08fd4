"""What came of a batch's lines: written in parts while it runs, put together to its output and its error file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from perllm.broker.api.batches.lines import FAILED, UNSUBMITTED, task_id
from perllm.broker.api.batches.store import BatchDocument
from perllm.broker.api.batches.submitter import LineSubmitter
from perllm.broker.api.files.store import Files
from perllm.broker.errors import StoreUnavailable
from perllm.broker.ledger import Ledger
from perllm.broker.messages import Result, State
from perllm.broker.openai.batch_file import BadLine, Line, error_line, failed_line, output_line

#: The two kinds of parts: of the output file and of the error file.
OUTPUT, ERROR = "out", "err"


class ResultFiles:
    """Writes results. A part is written whole or not at all, and may be written again. `renew` is called meanwhile."""

    def __init__(self, ledger: Ledger, files: Files, submitter: LineSubmitter, renew: Callable[[], None]) -> None:
        self._ledger, self._files, self._submitter, self._renew = ledger, files, submitter, renew

    # --- lines

    def write(
        self,
        batch: BatchDocument,
        marks: bytearray,
        lines: list[tuple[int, Line | BadLine]],
        succeeded: IO[bytes],
        failed: IO[bytes],
    ) -> bool:
        """Write the results of these lines; whether the batch's window was too short for any."""
        overdue = False
        results = self._ledger.each_result([task_id(batch, row) for row, _ in lines])
        for (row, line), result in zip(lines, results, strict=True):
            if result is None and marks[row] == FAILED and "cancelling" not in batch.times:
                checked = self._submitter.check(batch, line, batch.created)  # it may never have been submitted
                line = checked if isinstance(checked, BadLine) else line  # noqa: PLW2901
            if isinstance(line, BadLine):
                write_entry(failed, error_line(line))
                continue
            if result is not None and result.state is State.SUCCEEDED:
                for piece in output_line(line, result, batch.created):
                    succeeded.write(piece.encode(errors="replace"))
                succeeded.write(b"\n")
                continue
            entry = failed_line(line, result) if result else _forgotten(line)
            error = _error_of_batch(batch, line, result)
            if error is None and marks[row] == UNSUBMITTED:
                error = _expired("the limits of its key and tenant left no room for it")
            if error:
                entry["error"] = error
                overdue = overdue or error["code"] == "batch_expired"
            write_entry(failed, entry)
        return overdue

    # --- parts

    def put_part(self, batch: BatchDocument, kind: str, number: int, content: IO[bytes]) -> None:
        """Store a part."""
        content.seek(0)
        self._files.write(self._part(batch, kind, number), [content], self._renew)

    def make_files(self, batch: BatchDocument) -> dict[str, str]:
        """Put the parts together. Returns the files' ids, by the batch's field."""
        made = {}
        for kind, field, suffix in ((OUTPUT, "output_file_id", "output"), (ERROR, "error_file_id", "error")):
            parts = [p for n in range(batch.parts) if self._files.exists(p := self._part(batch, kind, n))]
            if parts:
                contents = (self._files.open(p) for p in parts)
                file = self._files.keep(
                    batch.tenant,
                    f"{batch.id}_{suffix}.jsonl",
                    "batch_output",
                    contents,
                    lasts=batch.output_lasts,
                    identity=f"file-{batch.id.removeprefix('batch_')}-{suffix}",
                    going_on=self._renew,
                )
                made[field] = file.id
        return made

    def discard_parts(self, batch: BatchDocument) -> None:
        """Remove the parts. Where that cannot be done now, `Files.sweep_orphans` will."""
        for kind in (OUTPUT, ERROR):
            for number in range(batch.parts):
                with suppress(StoreUnavailable):
                    self._files.discard(self._part(batch, kind, number))

    def _part(self, batch: BatchDocument, kind: str, number: int) -> str:
        return self._files.path(batch.tenant, f"{batch.id}.{kind}.{number}")


def write_entry(target: IO[bytes], entry: dict[str, Any]) -> None:
    """One line of an output or error file."""
    target.write(json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n")


def _error_of_batch(batch: BatchDocument, line: Line, result: Result | None) -> dict[str, str] | None:
    """The error of a line whose batch was cancelled, or over, before it was done."""
    state = result.state if result else None
    if state in (State.CANCELLED, None) and "cancelling" in batch.times:
        return {"code": "batch_cancelled", "message": "the batch was cancelled before this request was done"}
    by_window = state in (State.EXPIRED, State.REJECTED) and "deadline" not in line.fields
    if by_window or (state is State.CANCELLED and batch.overdue):
        return _expired(result.reason if result else None)
    return None


def _expired(reason: str | None) -> dict[str, str]:
    message = "this request could not be done before the completion window was over"
    return {"code": "batch_expired", "message": f"{message}: {reason}" if reason else message}


def _forgotten(line: Line) -> dict[str, Any]:
    message = "its result was forgotten before it could be collected (PERLLM_RETENTION)"
    return {"id": None, "custom_id": line.custom_id, "response": None, "error": {"code": "lost", "message": message}}
