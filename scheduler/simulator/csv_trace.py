"""Request traces recorded by other systems, as CSV: when requests came, and how long their prompts and outputs were."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from perllm.broker.errors import BadSetting

#: The packaged ones.
TRACES = Path(__file__).parent / "traces"


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Columns of a recorded trace, in order of time: s from its start, prompt and output tokens."""

    times: list[float]
    prompts: list[int]
    outputs: list[int]


@lru_cache(maxsize=4)
def read_csv_trace(name: str) -> RequestTrace:
    """Read a CSV of TIMESTAMP, ContextTokens, GeneratedTokens (Azure's public LLM traces), by packaged name or path.

    Raises BadSetting naming file, line and column.
    """
    path = TRACES / f"{name}.csv" if "/" not in name and not name.endswith(".csv") else Path(name)
    rows: list[tuple[float, int, int]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in (reader := csv.DictReader(file)):
                rows.append(_row(row, f"trace {path}, line {reader.line_num}"))
    except OSError as error:
        raise BadSetting(f"trace {path}: {error.strerror}") from None
    if len(rows) < 2:
        raise BadSetting(f"trace {path}: fewer than two requests")
    rows.sort()
    first = rows[0][0]
    return RequestTrace([t - first for t, _, _ in rows], [p for _, p, _ in rows], [o for _, _, o in rows])


def _row(row: dict[str, str], where: str) -> tuple[float, int, int]:
    try:
        stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])
        prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    except KeyError as error:
        raise BadSetting(f"{where}: column {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise BadSetting(f"{where}: {error}") from None
    if prompt < 1 or output < 1:
        raise BadSetting(f"{where}: tokens must be at least 1")
    return (stamp - datetime(1970, 1, 1)).total_seconds(), prompt, output
