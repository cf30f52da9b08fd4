"""Trace files: a live system's event stream, exported and replayed.

A trace is JSON lines: a header `{"perllm_trace": 1}`, then one event per line as `perllm.broker.messages` writes it.
Any events may be in it; a replay needs the `submitted` ones (arrival, sizes, deadline, value, class) and reads output
lengths off the `completed` ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from perllm.broker.errors import BadSetting, field_errors
from perllm.broker.messages import Completed, Event, State, Submitted, parse_event
from perllm.scheduler.simulator.atomic_file import write_atomically
from perllm.scheduler.simulator.workload import Arrival

VERSION = 1
_HEADER = {"perllm_trace": VERSION}


def write_trace(path: Path, events: Iterable[Event]) -> int:
    """Write a trace; returns how many events it holds. There is either a whole file or none. Raises BadSetting."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(_HEADER) + "\n")
            for event in events:
                file.write(event.model_dump_json() + "\n")
                count += 1

    write_atomically(path, write)
    return count


def read_trace(path: Path) -> list[Event]:
    """The events of a trace. Raises BadSetting naming file, line and field."""
    events: list[Event] = []
    try:
        with path.open(encoding="utf-8") as file:
            _check_header(file.readline(), path)
            for number, line in enumerate(file, start=2):
                if line.strip():
                    events.append(_event(line, f"trace {path}, line {number}"))
    except OSError as error:
        raise BadSetting(f"trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadSetting(f"trace {path}: not UTF-8 text") from None
    return events


def _check_header(line: str, path: Path) -> None:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or "perllm_trace" not in header:
        raise BadSetting(f'trace {path}, line 1: not a PerLLM trace: it must begin with {{"perllm_trace": {VERSION}}}')
    if header["perllm_trace"] != VERSION:
        raise BadSetting(
            f"trace {path}, line 1: version {header['perllm_trace']!r} of the format; this program reads {VERSION}"
        )


def _event(line: str, where: str) -> Event:
    try:
        event = parse_event(line)
    except ValidationError as error:
        raise BadSetting(f"{where}: {field_errors(error)}") from None
    if event.at < 0:
        raise BadSetting(f"{where}: at: a time cannot be negative (given {event.at})")
    if isinstance(event, Submitted):
        if event.deadline <= event.at:
            raise BadSetting(f"{where}: deadline: not after the submission (at {event.at}, given {event.deadline})")
        for field in ("prompt_tokens", "max_tokens"):
            if getattr(event, field) < 1:
                raise BadSetting(f"{where}: {field}: must be at least 1 (given {getattr(event, field)})")
    return event


def arrivals_of(events: Sequence[Event], *, seed: int = 0) -> list[Arrival]:
    """The tasks of a trace in order of arrival, from time 0. One of several answers is replayed as one of the longest.

    The true output length of a task that did not run to its end is not known: it is drawn from those of its class that
    did and were longer than what it had generated. Raises BadSetting for a trace without tasks.
    """
    submitted: dict[str, Submitted] = {}
    whole: dict[str, int] = {}
    partial: dict[str, int] = {}
    for event in events:
        if isinstance(event, Submitted):
            submitted.setdefault(event.id, event)
        elif isinstance(event, Completed):
            tokens = max(event.receipt.choice_tokens or (event.receipt.completion_tokens,))
            (whole if event.state is State.SUCCEEDED else partial)[event.id] = tokens
    if not submitted:
        raise BadSetting("trace: no task was submitted in it")
    tasks = sorted(submitted.values(), key=lambda e: e.at)
    known: dict[str, list[int]] = {}
    for task in tasks:
        if task.id in whole:
            known.setdefault(task.service, []).append(whole[task.id])
    rng, begin = np.random.default_rng(seed), tasks[0].at
    arrivals = []
    for task in tasks:
        output = whole.get(task.id)
        if output is None:
            least = partial.get(task.id, 0)
            longer = [n for n in known.get(task.service, []) if n > least] or [max(task.max_tokens, least)]
            output = longer[int(rng.integers(len(longer)))]
        moved = task.model_copy(update={"at": task.at - begin, "deadline": task.deadline - begin, "strikes": 0, "n": 1})
        arrivals.append(Arrival(moved, max(1, output)))
    return arrivals


def stretched(arrivals: Sequence[Arrival], factor: float, start: float = 0.0) -> list[Arrival]:
    """The same tasks with `factor` times the time between them, from `start` on; deadlines stay as far off."""
    moved = []
    for arrival in arrivals:
        event = arrival.event
        at = start + event.at * factor
        later = event.model_copy(update={"at": at, "deadline": at + event.deadline - event.at})
        moved.append(Arrival(later, arrival.output, arrival.text))
    return moved
