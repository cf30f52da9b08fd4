"""The OpenAI Batch file format, both ways: a line in becomes a task's fields, a result becomes a line out.

Source: platform.openai.com, "Batch API", request input and output objects. Beside what is there, a line (or its body)
may carry `deadline`, `value`, `service` and `expected_tokens`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from pydantic_core import from_json

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import Result, TaskSpec
from perllm.broker.openai import embeddings
from perllm.broker.openai.embeddings import EMBEDDINGS, RERANK, USUAL_FORM, AnswerForm
from perllm.broker.openai.sampling import as_asked
from perllm.broker.openai.translation import ENDPOINTS, EXTENSIONS, endpoint_of, response_pieces, task_fields

#: Longest `custom_id`, characters.
MAX_CUSTOM_ID = 512
#: Longest line, bytes.
MAX_LINE = 8 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch file: its number (from 1), the producer's `custom_id`, a TaskSpec's fields, not yet
    checked, how it is to be answered, and the names of the fields its body gave."""

    number: int
    custom_id: str
    url: str
    fields: Mapping[str, Any]
    form: AnswerForm = USUAL_FORM
    given: frozenset[str] = frozenset()

    def bad(self, error: InvalidTask) -> BadLine:
        """The line as one whose task is not acceptable, said of its own fields."""
        return BadLine(self.number, self.custom_id, as_asked(str(error), self.given))


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request, and why."""

    number: int
    custom_id: str | None
    reason: str


def texts(content: IO[bytes]) -> Iterator[str]:
    """A file's lines. One that is too long or no UTF-8 becomes one that is no JSON, and says so in its place."""
    while raw := content.readline(MAX_LINE):
        if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
            while (rest := content.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            raw = b"(a line of more than %d bytes)" % MAX_LINE
        try:
            yield raw.decode()
        except UnicodeDecodeError:
            yield "(not UTF-8 text)"


def read(lines: Iterable[str]) -> Iterator[Line | BadLine]:
    """Parse a batch file line by line; empty lines are skipped, a repeated `custom_id` is an error of its line."""
    seen: set[bytes] = set()  # digests: 50,000 long ids would be much to keep
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        line = _parse(number, text)
        if isinstance(line, Line):
            digest = hashlib.blake2b(line.custom_id.encode(errors="replace"), digest_size=16).digest()
            if digest in seen:
                line = BadLine(number, line.custom_id, f"custom_id: {line.custom_id!r} was used by an earlier line")
            seen.add(digest)
        yield line


def read_one(number: int, text: str) -> Line | BadLine:
    """The line of that number, by itself."""
    return _parse(number, text)


def _parse(number: int, text: str) -> Line | BadLine:
    try:
        raw = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        return BadLine(number, None, f"not JSON: {str(error).replace(' at line 1 column', ' at column')}")
    if not isinstance(raw, dict):
        return BadLine(number, None, "not a JSON object")
    custom_id = raw.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BadLine(number, None, "custom_id: a non-empty string is required")
    if len(custom_id) > MAX_CUSTOM_ID:
        return BadLine(number, None, f"custom_id: {len(custom_id)} characters; the limit is {MAX_CUSTOM_ID}")
    try:
        return Line(number, custom_id, *_fields(raw))
    except InvalidTask as error:
        return BadLine(number, custom_id, str(error))


def _fields(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any], AnswerForm, frozenset[str]]:
    body = raw.get("body")
    if not isinstance(body, dict):
        raise InvalidTask("body: an object is required")
    url = raw.get("url", endpoint_of(body))
    if raw.get("method", "POST") != "POST":
        raise InvalidTask(f"method: {raw['method']!r} is not POST")
    if url not in ENDPOINTS:
        raise InvalidTask(f"url: {url!r} is none of {', '.join(ENDPOINTS)}")
    extras = {k: raw[k] for k in EXTENSIONS if k in raw}
    form = embeddings.form(body, url) if url in (EMBEDDINGS, RERANK) else USUAL_FORM
    return url, {**task_fields(body, url), **extras}, form, frozenset(body)


def output_line(line: Line, result: Result, submitted: float) -> Iterator[str]:
    """A succeeded task's result as a line of the output file, without its end, in pieces. `submitted` is in s since the
    epoch."""
    spec = TaskSpec.model_validate({k: v for k, v in line.fields.items() if k != "deadline"})
    head = {"id": f"batch_req_{result.id}", "custom_id": line.custom_id}
    response = {"status_code": 200, "request_id": result.id}
    yield f'{_json(head)[:-1]}, "response": {_json(response)[:-1]}, "body": '
    yield from response_pieces(line.url, result, spec, submitted, line.form)
    yield '}, "error": null}'


def failed_line(line: Line, result: Result) -> dict[str, Any]:
    """The result of a task that did not succeed, as a line of the error file."""
    error = {"code": f"task_{result.state}", "message": result.reason or str(result.state)}
    return {"id": f"batch_req_{result.id}", "custom_id": line.custom_id, "response": None, "error": error}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def error_line(bad: BadLine) -> dict[str, Any]:
    """A line that was no request, as a line of the error file."""
    message = f"line {bad.number}: {bad.reason}"
    return {
        "id": None,
        "custom_id": bad.custom_id,
        "response": None,
        "error": {"code": "invalid_request", "message": message},
    }
