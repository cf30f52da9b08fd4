"""`perllm submit FILE.jsonl`: a batch file through the queue, with results and errors in files of the same format.

Bad lines do not stop their neighbours. Interrupted, the tasks go on; submitting under the same batch name again finds
them instead of running anything twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
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
) -> dict[str, Any]:
    """Submit every good line of `path`; with `wait`, write results as they are all there. Returns a report.

    `defaults` fill fields a line does not set. Raises BadSetting when a file cannot be read or written.
    """
    name = name or f"batch-{new_id()[:8]}"
    output = output or path.with_suffix(".output.jsonl")
    errors = errors or path.with_suffix(".errors.jsonl")
    bad: list[dict[str, Any]] = []
    submitted: dict[str, batch.Line] = {}  # task id → line
    good = _good_lines(client, path, defaults, name, bad, console)
    while piece := _take(good, 1000):
        handles = client.submit_many([spec for _, spec in piece])
        submitted.update({h.id: line for h, (line, _) in zip(handles, piece, strict=True)})
    console.print(f"{name}: {len(submitted)} task(s) submitted, {len(bad)} bad line(s)", highlight=False)
    report: dict[str, Any] = {"batch": name, "submitted": len(submitted), "bad_lines": len(bad), "errors": len(bad)}
    if not wait:
        _write(errors, bad)
        return report | {"task_ids": list(submitted)}
    try:
        done, failed, tally = _collect(client, submitted, name, console)
    except KeyboardInterrupt:
        again = f"perllm submit {path} --wait --batch {name}"
        console.print(f"interrupted; the tasks go on, pick them up with: {again}", highlight=False, soft_wrap=True)
        raise
    _write(output, done)
    _write(errors, bad + failed)
    console.print(f"{tally.line()}; results in {output}", highlight=False, soft_wrap=True)
    if bad or failed:
        console.print(f"{len(bad) + len(failed)} error(s) in {errors}", highlight=False, soft_wrap=True)
    files = {"output": str(output), "error_file": str(errors) if bad or failed else None}
    on_time = tally.on_time / tally.total if tally.total else None
    summary = show.node_summary(tally.results)
    return report | files | {"errors": len(bad) + len(failed), "on_time": on_time, "nodes": summary}


def _good_lines(
    client: Client, path: Path, defaults: Mapping[str, Any], name: str, bad: list[dict[str, Any]], console: Console
) -> Iterator[tuple[batch.Line, TaskSpec]]:
    for line in batch.read(_lines(path)):
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
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], show.Tally]:
    tally = show.Tally(len(submitted))
    began = time.time()
    by_id = {r.id: r for r in show.watch(console, client.wait(submitted), tally, title=name)}
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for task_id, line in submitted.items():  # in the file's order
        outcome = by_id[task_id]
        entry = batch.output_line(line, outcome, began)
        (done if outcome.state is State.SUCCEEDED else failed).append(entry)
    return done, failed, tally


def _write(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """The file whole or not at all; nothing for no entries."""
    entries = list(entries)
    if not entries:
        return
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
        os.replace(part, path)  # noqa: PTH105
    except OSError as error:
        raise BadSetting(f"{path}: {error.strerror}") from None


def _take(lines: Iterator[tuple[batch.Line, TaskSpec]], count: int) -> list[tuple[batch.Line, TaskSpec]]:
    return [pair for _, pair in zip(range(count), lines, strict=False)]
