"""A batch's lines: reading them from its input file, and what became of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from perllm.broker.api.batches.store import BatchDocument
from perllm.broker.api.files.store import FileDocument, Files
from perllm.broker.openai import batch_file
from perllm.broker.openai.batch_file import BadLine, Line

#: What became of a line, its byte in the batch's marks: submitted; refused, since it is no valid request; succeeded;
#: ended without a result; the last two with their results collected; not yet submitted.
OPEN, REFUSED, SUCCEEDED, FAILED, COLLECTED_SUCCEEDED, COLLECTED_FAILED, UNSUBMITTED = range(7)


class Position(NamedTuple):
    """A place in an input file: lines before it that are not empty, all lines before it, bytes before it."""

    row: int = 0
    number: int = 0
    offset: int = 0


#: The beginning of a file.
START = Position()


class RawLine(NamedTuple):
    """A line that is not empty: its place among these (from 0), by which it is marked; among all (from 1); the bytes
    before it; its text."""

    row: int
    number: int
    offset: int
    text: str

    @property
    def position(self) -> Position:
        return Position(self.row, self.number - 1, self.offset)


class LineReader:
    """Reads batches' input files, a line at a time."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def parsed(self, batch: BatchDocument) -> Iterator[Line | BadLine]:
        """The lines that are not empty, parsed; a `custom_id` used before is an error of its line. Raises
        FileNotFoundError."""
        with self._files.read(self._input(batch)) as content:
            for line in batch_file.read(batch_file.texts(content)):
                yield _of_endpoint(batch, line)

    def raw(self, batch: BatchDocument, start: Position = START) -> Iterator[RawLine]:
        """The lines that are not empty, from a position on. Raises FileNotFoundError."""
        row, number, offset = start
        with self._files.read(self._input(batch)) as content:
            if offset:
                content.seek(offset)
            for text in batch_file.texts(content):
                number += 1
                if text.strip():
                    yield RawLine(row, number, offset, text)
                    row += 1
                offset = content.tell()

    def _input(self, batch: BatchDocument) -> FileDocument:
        file = self._files.documents.get(batch.input_file_id, batch.tenant)
        if file is None:
            raise FileNotFoundError(batch.input_file_id)
        return file


def parse(batch: BatchDocument, raw: RawLine) -> Line | BadLine:
    """One line by itself."""
    return _of_endpoint(batch, batch_file.read_one(raw.number, raw.text))


def task_id(batch: BatchDocument, row: int) -> str:
    """The id of a line's task, the same each time."""
    return f"{batch.id}-{row:05d}"


def _of_endpoint(batch: BatchDocument, line: Line | BadLine) -> Line | BadLine:
    if isinstance(line, Line) and line.url != batch.endpoint:
        return BadLine(line.number, line.custom_id, f"url: {line.url!r} is not the batch's endpoint, {batch.endpoint}")
    return line
