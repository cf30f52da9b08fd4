"""`perllm simulate`: run a scenario under several policies and compare them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from perllm.broker.errors import BadSetting, PerLLMError
from perllm.scheduler.policies import policy_names
from perllm.scheduler.simulator import report
from perllm.scheduler.simulator.atomic_file import make_folder
from perllm.scheduler.simulator.result import ON_TIME_TARGET, RunResult
from perllm.scheduler.simulator.scenario import Scenario, load_scenario, scenario_names
from perllm.scheduler.simulator.trace import arrivals_of, read_trace

#: Where results go when `--out` is not given.
DEFAULT_OUT = Path("perllm-simulation")


def simulate(
    scenario: Annotated[str, typer.Argument(help=f"A .toml file, or one of: {', '.join(scenario_names())}")],
    policy: Annotated[
        str,
        typer.Option(
            help="Policies to compare, separated by commas; a baseline with '+mech' runs "
            f"with CS-UCB's mechanisms. Known: {', '.join(policy_names())}; also 'informed' and 'foresight', which "
            "see the simulator's truth, and 'clairvoyant', the best schedules found with it"
        ),
    ] = "cs-ucb",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run each with.")] = 4,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    load: Annotated[
        str | None, typer.Option(help="Loads as shares of capacity, e.g. 0.5,0.9; default: the scenario's.")
    ] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks per run; default: the scenario's.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Replay this exported event stream instead of the scenario's arrivals; as fast as it was recorded, or "
            "at --load."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for the JSON file and the plot; default: {DEFAULT_OUT}.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table; write files only to --out.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes to use.")] = 1,
) -> None:
    """Simulate a scenario under several policies: a table, a JSON file and a plot.

    Ctrl-C ends it and keeps what has finished.
    """
    try:
        from perllm.scheduler.simulator.sweep import check_sweep, run_specs, sweep, trace_load  # noqa: PLC0415
    except ImportError as error:
        raise BadSetting(f"simulations need {error.name}: pip install 'perllm[simulate]'") from None
    chosen = load_scenario(scenario)
    if tasks is not None:
        chosen = chosen.model_copy(update={"tasks": tasks})
    policies = [name.strip() for name in policy.split(",") if name.strip()]
    if not policies:
        raise BadSetting("--policy: name at least one policy")
    check_sweep(chosen, policies)
    recorded = arrivals_of(read_trace(trace)) if trace is not None else None
    if recorded is not None:
        recorded = recorded[:tasks]
        chosen = chosen.model_copy(update={"loads": (trace_load(chosen, recorded),)})
    specs = run_specs(policies, _loads(load) or chosen.loads, range(first_seed, first_seed + seeds))
    folder = None if as_json and out is None else out or DEFAULT_OUT
    if folder is not None:
        make_folder(folder)
    with _progress(quiet=as_json) as progress:
        bar = progress.add_task("simulating", total=len(specs), now="")

        def done(run: RunResult) -> None:
            progress.update(bar, advance=1, now=f"{run.policy} at {run.load:.0%}, seed {run.seed}")

        runs = sweep(chosen, specs, jobs=jobs, trace=recorded, done=done)
    _report(chosen, Path(scenario).stem, runs, folder, as_json=as_json)
    if len(runs) < len(specs):
        print(f"interrupted: {len(runs)} of {len(specs)} runs finished and kept", file=sys.stderr)
        raise typer.Exit(130)


def _progress(*, quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
        transient=True,
        disable=quiet,
    )


def _loads(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        loads = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadSetting(f"--load: give numbers separated by commas, e.g. 0.5,0.9 (given {text!r})") from None
    if not all(0 < x < 100 for x in loads):
        raise BadSetting(f"--load: shares of capacity must be above 0 and below 100 (given {text!r})")
    return loads


def _report(scenario: Scenario, stem: str, runs: list[RunResult], folder: Path | None, *, as_json: bool) -> None:
    if not runs:
        return
    if as_json:
        print(json.dumps(report.as_json(scenario.title, runs)))
    else:
        console = Console()
        console.print(report.table(scenario.title, runs))
        for policy, capacity in report.capacities(runs).items():
            console.print(f"{policy}: at least {ON_TIME_TARGET:.0%} on time up to {capacity:.0%} load", highlight=False)
    if folder is not None:
        report.write_json(folder / f"{stem}.json", scenario.title, runs)
        report.write_plot(folder / f"{stem}.png", scenario.title, runs)
        if not as_json:
            print(f"written: {folder / stem}.json, {folder / stem}.png")


def main() -> None:
    """`python -m perllm.scheduler.simulator`."""
    try:
        typer.run(simulate)
    except PerLLMError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
