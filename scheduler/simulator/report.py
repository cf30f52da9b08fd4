"""A sweep's runs as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from perllm.broker.errors import BadSetting
from perllm.scheduler.policies import MECHANISMS
from perllm.scheduler.simulator.atomic_file import write_atomically
from perllm.scheduler.simulator.result import ON_TIME_TARGET, RunResult, effective_capacity, mean


def by_policy_and_load(runs: Sequence[RunResult]) -> dict[str, dict[float, list[RunResult]]]:
    """Runs by policy and load, in the order they come."""
    found: dict[str, dict[float, list[RunResult]]] = {}
    for run in runs:
        found.setdefault(run.policy, {}).setdefault(run.load, []).append(run)
    return found


def capacities(runs: Sequence[RunResult]) -> dict[str, float]:
    """Effective capacity per policy, of the mean over seeds; only loads that were run count."""
    return {
        policy: effective_capacity([(load, mean(some, "on_time")) for load, some in loads.items()])
        for policy, loads in by_policy_and_load(runs).items()
    }


def table(title: str, runs: Sequence[RunResult]) -> Table:
    """Means over seeds, a row per policy and load. Energy is per on-time task."""
    view = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    view.add_column("policy", no_wrap=True)
    for name in ("load", "on time", "J", "idle J", "p50 s", "p95 s", "refused"):
        view.add_column(name, justify="right", no_wrap=True)
    for policy, loads in by_policy_and_load(runs).items():
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


def as_json(title: str, runs: Sequence[RunResult]) -> dict[str, Any]:
    """Every run's figures and the effective capacity of each policy."""
    return {
        "title": title,
        "carried": ON_TIME_TARGET,
        "effective_capacity": capacities(runs),
        "runs": [run.figures() for run in runs],
    }


def write_json(path: Path, title: str, runs: Sequence[RunResult]) -> None:
    """Write `as_json` to `path`."""
    write_atomically(path, lambda p: _dump(p, as_json(title, runs)))


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, title: str, runs: Sequence[RunResult]) -> None:
    """On-time share and energy per on-time task against load, a line per policy. Raises BadSetting without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
        from matplotlib.ticker import ScalarFormatter  # noqa: PLC0415
    except ImportError:
        raise BadSetting("the plot needs matplotlib: pip install 'perllm[simulate]'") from None
    found = by_policy_and_load(runs)
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
    share.axhline(100 * ON_TIME_TARGET, color="grey", linewidth=0.8, linestyle=":")
    share.set(xlabel="load, % of capacity", ylabel="tasks on time, %", ylim=(0, 100))
    energy.set(xlabel="load, % of capacity", ylabel="energy per on-time task, J (idle power apart)", yscale="log")
    for axis in (energy.yaxis.set_major_formatter, energy.yaxis.set_minor_formatter):
        axis(ScalarFormatter())
    figure.legend(*share.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(title)
    write_atomically(path, lambda p: figure.savefig(p, dpi=120))
