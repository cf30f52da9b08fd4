"""`perllm submit FILE.jsonl`: a batch file through the queue, with results and errors in files of the same format.

Bad lines do not stop their neighbours. Interrupted, the tasks go on; submitting under the same batch name again finds
them instead of running anything twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from perllm.broker.cli import terminal as show
from perllm.broker.client import Client
from perllm.broker.errors import BadSetting, InvalidTask
from perllm.broker.messages import State, TaskSpec, new_id
from perllm.broker.openai import batch_file as batch


def run(
    client: Client,
    path: Path,
    defaults: Mapping[str, Any],
    name: str | None,
    wait: bool,
    output: Path | None,
    errors: Path | None,
    console: Console,
    *,
    as_requests: Callable[[Iterable[str]], Iterable[str]] = iter,
    again: str | None = None,
) -> dict[str, Any]:
    """Submit every good line of `path`; with `wait`, write results as they are all there. Returns a report.

    `defaults` fill fields a line does not set. `as_requests` makes its lines requests in OpenAI Batch format; `again`
    is the command that goes on, less the batch's name. Raises BadSetting when a file cannot be read or written.
    """
    name = name or f"batch-{new_id()[:8]}"
    output = output or path.with_suffix(".output.jsonl")
    errors = errors or path.with_suffix(".errors.jsonl")
    bad: list[dict[str, Any]] = []
    submitted: dict[str, batch.Line] = {}  # task id → line
    good = _good_lines(client, path, as_requests(_lines(path)), defaults, name, bad, console)
    while piece := _take(good, 1000):
        handles = client.submit_many([spec for _, spec in piece])
        submitted.update({h.id: line for h, (line, _) in zip(handles, piece, strict=True)})
    console.print(f"{name}: {len(submitted)} task(s) submitted, {len(bad)} bad line(s)", highlight=False)
    report: dict[str, Any] = {"batch": name, "submitted": len(submitted), "bad_lines": len(bad), "errors": len(bad)}
    if not wait:
        write(errors, _as_lines(bad))
        return report | {"task_ids": list(submitted)}
    try:
        done, failed, tally = _collect(client, submitted, name, console)
    except KeyboardInterrupt:
        command = f"{again or f'perllm submit {path} --wait --batch'} {name}"
        console.print(f"interrupted; the tasks go on, pick them up with: {command}", highlight=False, soft_wrap=True)
        raise
    write(output, done)
    write(errors, _as_lines(bad + failed))
    console.print(f"{tally.line()}; results in {output}", highlight=False, soft_wrap=True)
    if bad or failed:
        console.print(f"{len(bad) + len(failed)} error(s) in {errors}", highlight=False, soft_wrap=True)
    files = {"output": str(output), "error_file": str(errors) if bad or failed else None}
    on_time = tally.on_time / tally.total if tally.total else None
    summary = show.node_summary(tally.results)
    return report | files | {"errors": len(bad) + len(failed), "on_time": on_time, "nodes": summary}


def _good_lines(
    client: Client,
    path: Path,
    lines: Iterable[str],
    defaults: Mapping[str, Any],
    name: str,
    bad: list[dict[str, Any]],
    console: Console,
) -> Iterator[tuple[batch.Line, TaskSpec]]:
    for line in batch.read(lines):
        checked = _checked(client, line, defaults, name)
        if isinstance(checked, batch.BadLine):
            where = f"{path}:{checked.number}"
            console.print(f"{where}: {checked.reason}", style="red", highlight=False, markup=False, soft_wrap=True)
            bad.append(batch.error_line(checked))
        else:
            yield checked


def _checked(
    client: Client, line: batch.Line | batch.BadLine, defaults: Mapping[str, Any], name: str
) -> tuple[batch.Line, TaskSpec] | batch.BadLine:
    if isinstance(line, batch.BadLine):
        return line
    try:
        return line, client.accept({**defaults, **line.fields, "idempotency_key": f"{name}:{line.custom_id}"})
    except InvalidTask as error:
        return line.bad(error)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            yield from batch.texts(file)
    except OSError as error:
        raise BadSetting(f"{path}: {error.strerror}") from None


def _collect(
    client: Client, submitted: Mapping[str, batch.Line], name: str, console: Console
) -> tuple[Iterator[str], list[dict[str, Any]], show.Tally]:
    """The output file's text in pieces, and the lines of the error file, in the input's order."""
    tally = show.Tally(len(submitted))
    began = time.time()
    by_id = {r.id: r for r in show.watch(console, client.wait(submitted), tally, title=name)}
    done = {i: line for i, line in submitted.items() if by_id[i].state is State.SUCCEEDED}
    failed = [batch.failed_line(line, by_id[i]) for i, line in submitted.items() if i not in done]
    return (p for i, line in done.items() for p in (*batch.output_line(line, by_id[i], began), "\n")), failed, tally


def _as_lines(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def write(path: Path, pieces: Iterator[str]) -> None:
    """The file whole or not at all; nothing for no text."""
    if (first := next(pieces, None)) is None:
        return
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(first)
            file.writelines(pieces)
        os.replace(part, path)  # noqa: PTH105
    except OSError as error:
        raise BadSetting(f"{path}: {error.strerror}") from None


def _take(lines: Iterator[tuple[batch.Line, TaskSpec]], count: int) -> list[tuple[batch.Line, TaskSpec]]:
    return [pair for _, pair in zip(range(count), lines, strict=False)]
