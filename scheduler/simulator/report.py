"""A sweep's runs as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from perllm.broker.errors import BadSetting
from perllm.scheduler.policies import MECHANISMS
from perllm.scheduler.simulator.result import CARRIED, Run, effective_capacity, mean


def grouped(runs: Sequence[Run]) -> dict[str, dict[float, list[Run]]]:
    """Runs by policy and load, in the order they come."""
    found: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.policy, {}).setdefault(run.load, []).append(run)
    return found


def capacities(runs: Sequence[Run]) -> dict[str, float]:
    """Effective capacity per policy, of the mean over seeds; only loads that were run count."""
    return {
        policy: effective_capacity([(load, mean(some, "on_time")) for load, some in loads.items()])
        for policy, loads in grouped(runs).items()
    }


def table(title: str, runs: Sequence[Run]) -> Table:
    """Means over seeds, a row per policy and load. Energy is per on-time task."""
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("policy", no_wrap=True)
    for name in ("load", "on time", "J", "idle J", "p50 s", "p95 s", "refused"):
        view.add_column(name, justify="right", no_wrap=True)
    for policy, loads in grouped(runs).items():
        for load, some in loads.items():
            view.add_row(
                policy,
                f"{load:.0%}",
                f"{mean(some, 'on_time'):.1%}",
                f"{mean(some, 'joules'):.1f}",
                f"{mean(some, 'joules_idle'):.1f}",
                f"{mean(some, 'latency_p50'):.2f}",
                f"{mean(some, 'latency_p95'):.2f}",
                f"{mean(some, 'rejected'):.0f}",
            )
        view.add_section()
    return view


def as_json(title: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Every run's figures and the effective capacity of each policy."""
    return {
        "title": title,
        "carried": CARRIED,
        "effective_capacity": capacities(runs),
        "runs": [run.figures() for run in runs],
    }


def make_folder(folder: Path) -> None:
    """Make sure there is such a folder. Raises BadSetting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"output {folder}: {error.strerror}") from None


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place: there is no half-written file.

    Raises BadSetting when it cannot be written.
    """
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise BadSetting(f"output {path}: {error.strerror}") from None
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise BadSetting(f"output {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Write `as_json` to `path`."""
    write_whole(path, lambda p: _dump(p, as_json(title, runs)))


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, title: str, runs: Sequence[Run]) -> None:
    """On-time share and energy per on-time task against load, a line per policy. Raises BadSetting without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
        from matplotlib.ticker import ScalarFormatter  # noqa: PLC0415
    except ImportError:
        raise BadSetting("the plot needs matplotlib: pip install 'perllm[simulate]'") from None
    found = grouped(runs)
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(p.removesuffix(MECHANISMS) for p in found))}
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    share, energy = figure.subplots(1, 2)
    for policy, loads in found.items():
        # A policy with the mechanisms is its plain self's colour, dashed
        line = {
            "color": colours[policy.removesuffix(MECHANISMS)],
            "linestyle": "--" if policy.endswith(MECHANISMS) else "-",
            "marker": "o",
            "markersize": 4,
            "label": policy,
        }
        xs = sorted(loads)
        share.plot([100 * x for x in xs], [100 * mean(loads[x], "on_time") for x in xs], **line)
        energy.plot([100 * x for x in xs], [mean(loads[x], "joules") for x in xs], **line)
    share.axhline(100 * CARRIED, color="grey", linewidth=0.8, linestyle=":")
    share.set(xlabel="load, % of capacity", ylabel="tasks on time, %", ylim=(0, 100))
    energy.set(xlabel="load, % of capacity", ylabel="energy per on-time task, J (idle power apart)", yscale="log")
    for axis in (energy.yaxis.set_major_formatter, energy.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    figure.legend(*share.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(title)
    write_whole(path, lambda p: figure.savefig(p, dpi=120))
