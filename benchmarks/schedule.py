"""`make bench-schedule`: where CS-UCB wins in the simulator, by how much, and where it does not.

Every policy meets the same arrivals, noise and faults per seed; the seeds (from 1000 on) were not used for tuning.
Ratios are medians over seeds, with [lowest, highest] as their spread. What the figures mean:

- `capacity_over_*`: effective capacity (highest load with at least 80 % of tasks on time) over another policy's, in
  the `paper` scenario with Poisson arrivals; `*_bursts`: the same with MMPP arrivals. `best_heuristic` is the best of
  round robin, least loaded, power of two, cheapest feasible and earliest completion, each as it is and with CS-UCB's
  mechanisms; `best_jsq` leaves out the two that forecast with the nodes' boot profiles.
- `ontime_vs_clairvoyant_*`, `ontime_vs_informed_min` (the least over loads up to 90 % and both arrivals),
  `energy_vs_clairvoyant_*`: ratios at that load; energy is per on-time task, idle power apart.
- `recovery_tasks_max`: tasks from a fault on until the on-time share of the next 50 tasks, and of all the rest, is
  within 3 points of the informed oracle's under the same fault; the worst of three faults.
- `worst_points_vs_best_heuristic`: on-time share less the best simple heuristic's, points; the worst scenario and
  load.
- `wrong_profile_points`: points lost to wrong boot profiles after the first 100 tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, emit
from perllm.broker.messages import State
from perllm.scheduler.csucb.policy import Mechanisms
from perllm.scheduler.policies import make_policy, policy_names
from perllm.scheduler.simulator import report
from perllm.scheduler.simulator.atomic_file import write_atomically
from perllm.scheduler.simulator.pretraining import pretrain
from perllm.scheduler.simulator.result import RunResult, effective_capacity, mean
from perllm.scheduler.simulator.scenario import Scenario, load_scenario, scenario_names
from perllm.scheduler.simulator.simulation import Simulation
from perllm.scheduler.simulator.sweep import RunSpec, sweep

FIRST_SEED = 1000
OURS = "cs-ucb"
JSQ = ("round-robin", "least-loaded", "power-of-two")
FORECASTING = ("cheapest-feasible", "earliest-completion")
HEURISTICS = tuple(f"{name}{mech}" for name in (*JSQ, *FORECASTING) for mech in ("", "+mech"))
COMPARED = (OURS, "clairvoyant", "informed", "cs-ucb-paper", "cs-ucb-paper+mech", "cloud-only+mech", *HEURISTICS)
LOADS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5)
FAULTS = ("edge-slows", "cloud-slows", "bandwidth-collapse")
ONSET = 120.0  # s, when the faults of FAULTS begin


@dataclass(frozen=True)
class Size:
    """How much to run."""

    seeds: int
    weak_seeds: int
    fault_seeds: int
    agod_runs: int
    tasks: int | None
    loads: tuple[float, ...]


FULL = Size(seeds=4, weak_seeds=2, fault_seeds=16, agod_runs=40, tasks=None, loads=LOADS)
QUICK = Size(seeds=1, weak_seeds=1, fault_seeds=4, agod_runs=8, tasks=1500, loads=(0.3, 0.5, 0.7, 0.9, 1.1, 1.3))

#: Runs by (policy, load), one per seed.
SweepResult = dict[tuple[str, float], list[RunResult]]


class Bench:
    """Runs simulations and keeps what the figures need of them."""

    def __init__(self, size: Size, jobs: int) -> None:
        self.size, self.jobs = size, jobs
        self.figures: dict[str, float] = {}
        self.spread: dict[str, list[float]] = {}
        self.tables: dict[str, Any] = {}
        self.console = Console(stderr=True)

    def scenario(self, name: str) -> Scenario:
        scenario = load_scenario(name)
        return scenario.model_copy(update={"tasks": min(scenario.tasks, self.size.tasks or scenario.tasks)})

    def sweep(self, scenario: Scenario, policies: Iterable[str], loads: Sequence[float], seeds: int) -> SweepResult:
        """All policies at all loads, outcomes left out."""
        specs = [RunSpec(p, x, FIRST_SEED + s) for p in policies for x in loads for s in range(seeds)]
        found: SweepResult = {}
        for spec, run in zip(specs, self.run(scenario, specs), strict=True):
            found.setdefault((spec.policy, spec.load), []).append(replace(run, outcomes=()))
        return found

    def run(self, scenario: Scenario, specs: Sequence[RunSpec]) -> list[RunResult]:
        done = 0

        def progress(_: RunResult) -> None:
            nonlocal done
            done += 1
            if self.console.is_terminal or done == len(specs):
                end = "\n" if done == len(specs) else "\r"
                print(f"  {scenario.title}: {done} of {len(specs)}   ", end=end, file=sys.stderr, flush=True)

        runs = sweep(scenario, specs, jobs=self.jobs, done=progress)
        if len(runs) < len(specs):
            raise KeyboardInterrupt
        return runs

    def put(self, name: str, samples: Sequence[float]) -> None:
        """A figure: the median of its samples, and their range."""
        self.figures[name] = statistics.median(samples)
        self.spread[name] = [min(samples), max(samples)]

    # --- the parts

    def compare(self) -> None:
        """The `paper` scenario, Poisson and MMPP: capacities, shares and energies against the others."""
        least_against_informed: list[list[float]] = []
        for name, suffix in (("paper", ""), ("paper-bursts", "_bursts")):
            swept = self.sweep(self.scenario(name), COMPARED, self.size.loads, self.size.seeds)
            self.capacities(swept, suffix)
            for load in (0.3, 0.5, 0.7, 0.9):
                self.put(
                    f"ontime_vs_clairvoyant_{load:.0%}{suffix}".replace("%", ""), ratios(swept, load, "clairvoyant")
                )
                least_against_informed.append(ratios(swept, load, "informed"))
            for load in (0.7, 0.9, 1.1):
                key = f"energy_vs_clairvoyant_{load:.0%}{suffix}".replace("%", "")
                self.put(key, ratios(swept, load, "clairvoyant", "joules"))
            self.tables[f"on_time_{name}"] = by_policy(swept, "on_time")
            self.tables[f"joules_{name}"] = by_policy(swept, "joules")
            runs = [run for some in swept.values() for run in some]
            report.write_plot(RESULTS / f"schedule-{name}.png", load_scenario(name).title, runs)
        self.put("ontime_vs_informed_min", min(least_against_informed, key=statistics.median))

    def capacities(self, swept: SweepResult, suffix: str) -> None:
        found = {p: capacities(swept, p, self.size.loads) for p in {policy for policy, _ in swept}}
        jsq = [h for h in HEURISTICS if h.startswith(JSQ)]
        rivals = {
            "cloud": ("cloud-only+mech",),
            "paper": ("cs-ucb-paper",),
            "paper_mech": ("cs-ucb-paper+mech",),
            "best_heuristic": HEURISTICS,
            "best_jsq": jsq,
            "clairvoyant": ("clairvoyant",),
        }
        for name, policies in rivals.items():
            best = [max(values) for values in zip(*(found[p] for p in policies), strict=True)]
            self.put(f"capacity_over_{name}{suffix}", [a / b for a, b in zip(found[OURS], best, strict=True)])
        self.tables[f"effective_capacity{suffix or '_poisson'}"] = {
            p: statistics.median(values)
            for p, values in sorted(found.items(), key=lambda kv: -statistics.median(kv[1]))
        }

    def others(self) -> None:
        """The baselines that are far behind, once, for the table."""
        rest = [p for p in policy_names() if p not in COMPARED and p != "agod"]
        names = [name + mech for name in rest for mech in ("", "+mech") if name + mech not in COMPARED]
        swept = self.sweep(self.scenario("paper"), names, (0.3, 0.5, 0.7, 0.9), self.size.weak_seeds)
        self.tables["on_time_others"] = by_policy(swept, "on_time")
        self.tables["joules_others"] = by_policy(swept, "joules")

    def agod(self) -> None:
        """AGOD, trained in the simulator on seeds kept for that; left out where torch is not installed."""
        if find_spec("torch") is None:
            self.tables["agod"] = "not run: torch is not installed"
            return
        scenario, loads = self.scenario("paper"), (0.3, 0.5, 0.7, 0.9)
        shares: dict[str, dict[str, float]] = {}
        for name in ("agod", "agod+mech"):
            print(f"  {name}: pretraining on {self.size.agod_runs} runs", file=sys.stderr)
            learned = pretrain(make_policy(name), scenario, loads=loads, seeds=range(self.size.agod_runs))
            for load in loads:
                runs = []
                for seed in range(FIRST_SEED, FIRST_SEED + self.size.weak_seeds):
                    policy = make_policy(name, seed)
                    policy.restore(learned)
                    runs.append(Simulation(scenario, policy, load=load, seed=seed).run())
                shares.setdefault(name, {})[f"{load:.0%}"] = mean(runs, "on_time")
        self.tables["agod"] = shares

    def everywhere(self) -> None:
        """Every packaged scenario against the simple heuristics."""
        worst: list[tuple[float, str, str]] = []
        rows: dict[str, Any] = {}
        for name in scenario_names():
            scenario = self.scenario(name)
            loads = scenario.loads if scenario.fault or scenario.boot_error else (0.5, 0.7, 0.9, 1.1)
            swept = self.sweep(scenario, (OURS, *HEURISTICS), loads, self.size.weak_seeds)
            for load in loads:
                shares = {p: mean(runs, "on_time") for (p, x), runs in swept.items() if x == load}
                best = max(HEURISTICS, key=lambda h: shares[h])
                points = 100 * (shares[OURS] - shares[best])
                where = f"{name} at {load:.0%}"
                rows[where] = {OURS: round(shares[OURS], 4), best: round(shares[best], 4), "points": round(points, 2)}
                worst.append((points, where, best))
        points, where, best = min(worst)
        self.figures["worst_points_vs_best_heuristic"] = points
        self.spread["worst_points_vs_best_heuristic"] = [points, max(worst)[0]]
        self.tables["against_best_heuristic"] = {"worst_at": f"{where}, against {best}", **rows}

    def recovery(self) -> None:
        """How soon the on-time share settles after a fault."""
        found: dict[str, Any] = {}
        for name in FAULTS:
            scenario = load_scenario(name)
            (load,) = scenario.loads
            curves = {}
            for policy in (OURS, "informed", "earliest-completion+mech"):
                seeds = range(FIRST_SEED, FIRST_SEED + self.size.fault_seeds)
                runs = self.run(scenario, [RunSpec(policy, load, s) for s in seeds])
                curves[policy] = after_onset([on_time_from(run, ONSET) for run in runs])
            found[name] = {
                policy: {
                    "tasks": recovered(curve, curves["informed"]),
                    "blocks_of_25": [round(x, 3) for x in curve[:24]],
                }
                for policy, curve in curves.items()
            }
        self.tables["recovery"] = found
        tasks = [float(found[name][OURS]["tasks"]) for name in FAULTS]
        self.figures["recovery_tasks_max"] = max(tasks)
        self.spread["recovery_tasks_max"] = [min(tasks), max(tasks)]

    def profiles(self) -> None:
        """Wrong boot profiles against right ones, the first 100 tasks left out."""
        shares: dict[str, list[float]] = {}
        for name in ("paper", "wrong-profiles"):
            seeds = range(FIRST_SEED, FIRST_SEED + self.size.fault_seeds)
            runs = self.run(self.scenario(name), [RunSpec(OURS, 0.7, s) for s in seeds])
            shares[name] = [float(np.mean([o.on_time for o in run.outcomes[100:]])) for run in runs]
        lost = [100 * (a - b) for a, b in zip(shares["paper"], shares["wrong-profiles"], strict=True)]
        self.figures["wrong_profile_points"] = statistics.mean(lost)
        self.spread["wrong_profile_points"] = [min(lost), max(lost)]

    def ablation(self) -> None:
        """One mechanism off at a time."""
        loads, seeds = (0.5, 0.9, 1.1), self.size.weak_seeds
        whole = RunSpec(OURS, 1.0, FIRST_SEED)
        variants = {"all on": whole, "without abort": replace(whole, abort=False)}
        for field in fields(Mechanisms):
            off = Mechanisms(**{field.name: False})
            variants[f"without {field.name}"] = replace(whole, options=(("mechanisms", off),))
        rows: dict[str, Any] = {}
        for where in ("paper", "measured", "poor-hints", "wrong-profiles", "rotating-slowdowns"):
            scenario = self.scenario(where)
            for name, variant in variants.items():
                specs = [replace(variant, load=x, seed=FIRST_SEED + s) for x in loads for s in range(seeds)]
                runs = self.run(scenario, specs)
                for load in loads:
                    some = [run for run, spec in zip(runs, specs, strict=True) if spec.load == load]
                    row = rows.setdefault(where, {}).setdefault(name, {})
                    row[f"{load:.0%}"] = [round(mean(some, "on_time"), 4), round(mean(some, "joules"), 1)]
        self.tables["ablation"] = rows

    def regret(self) -> None:
        """Cumulative regret of CS-UCB as published against the informed oracle, beside the paper's bound."""
        scenario, seed = self.scenario("paper"), FIRST_SEED
        services, nodes = len(scenario.service), sum(n.count for n in scenario.node)
        curves = {}
        for load in (0.5, 0.9):
            paper, oracle = self.run(scenario, [RunSpec("cs-ucb-paper", load, seed), RunSpec("informed", load, seed)])
            scale = max(o.joules for o in (*paper.outcomes, *oracle.outcomes))
            theirs, penalty = rewards(paper, scale)
            best, _ = rewards(oracle, scale)
            t = np.arange(1, len(theirs) + 1)
            bound = np.sqrt(2 * services * nodes * np.log(np.maximum(t, 2)))
            curves[load] = (t, np.cumsum(best - theirs), bound, bound + np.cumsum(penalty))
            self.figures[f"regret_over_bound_{load:.0%}".replace("%", "")] = float(
                curves[load][1][-1] / curves[load][3][-1]
            )
        plot_regret(RESULTS / "schedule-regret.png", curves)

    def speed(self) -> None:
        """Simulated tasks per second of wall time, at 90 % load."""
        scenario = self.scenario("paper")
        for policy in ("least-loaded+mech", OURS):
            runs = self.run(scenario, [RunSpec(policy, 0.9, FIRST_SEED + s) for s in range(3)])
            self.put(f"simulated_tasks_s_{policy}", [run.tasks / run.wall for run in runs])


def ratios(swept: SweepResult, load: float, other: str, figure: str = "on_time") -> list[float]:
    """Our figure over another policy's, per seed."""
    pairs = zip(swept[OURS, load], swept[other, load], strict=True)
    return [getattr(a, figure) / getattr(b, figure) for a, b in pairs]


def capacities(swept: SweepResult, policy: str, loads: Sequence[float]) -> list[float]:
    """Effective capacity per seed."""
    columns = zip(*(swept[policy, load] for load in loads), strict=True)
    return [effective_capacity([(run.load, run.on_time) for run in column]) for column in columns]


def by_policy(swept: SweepResult, figure: str) -> dict[str, dict[str, float]]:
    """Means over seeds: policy → load → figure."""
    found: dict[str, dict[str, float]] = {}
    for (policy, load), runs in swept.items():
        found.setdefault(policy, {})[f"{load:.0%}"] = float(f"{mean(runs, figure):.4g}")
    return found


def on_time_from(run: RunResult, onset: float) -> list[bool]:
    """Whether each task submitted from `onset` (s) on was on time."""
    return [o.on_time for o in run.outcomes if o.submitted >= onset]


def after_onset(runs: Sequence[Sequence[bool]], block: int = 25) -> list[float]:
    """The on-time share in blocks of tasks after the onset, mean over runs."""
    length = min(len(r) for r in runs) // block * block
    shares = np.array([r[:length] for r in runs], dtype=float).mean(axis=0)
    return [float(x) for x in shares.reshape(-1, block).mean(axis=1)]


def recovered(ours: Sequence[float], reference: Sequence[float], block: int = 25, tolerance: float = 0.03) -> int:
    """Tasks until the share of two blocks in a row, and of all blocks from there on, is at most `tolerance` below the
    reference's; all of them if that never comes."""
    below = np.array(reference) - np.array(ours)
    for i in range(len(below) - 1):
        if below[i : i + 2].mean() <= tolerance and below[i:].mean() <= tolerance:
            return i * block
    return len(below) * block


def rewards(run: RunResult, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The paper's reward of each task (deadline slack less normalised energy; a task that did not finish has slack −1)
    and its penalty |min(slack, 0)|."""
    slack = np.array(
        [
            1 - (o.ended - o.submitted) / (o.deadline - o.submitted) if o.state is State.SUCCEEDED else -1.0
            for o in run.outcomes
        ]
    )
    joules = np.array([o.joules for o in run.outcomes])
    return slack - joules / scale, np.maximum(-slack, 0.0)


def plot_regret(path: Path, curves: dict[float, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (load, (t, regret, bound, with_penalty)) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        axes.plot(t, regret, label="cs-ucb-paper, against the informed oracle")
        axes.plot(t, with_penalty, label="bound sqrt(2MN log L) + θP(t)")
        axes.plot(t, bound, linestyle=":", label="sqrt(2MN log L) alone")
        axes.set(title=f"{load:.0%} load", xlabel="tasks", ylabel="cumulative regret")
        axes.legend(fontsize="small")
    write_atomically(path, lambda p: figure.savefig(p, dpi=120))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and tasks: minutes, not half an hour")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parts = ("compare", "others", "agod", "everywhere", "recovery", "profiles", "ablation", "regret", "speed")
    parser.add_argument("--only", choices=parts, action="append", help="leave the other parts out; nothing is kept")
    options = parser.parse_args()
    bench = Bench(QUICK if options.quick else FULL, options.jobs)
    for part in options.only or parts:
        getattr(bench, part)()
    show(bench)
    if options.only:
        print({"figures": bench.figures, "spread": bench.spread})
    else:
        write_atomically(RESULTS / "schedule-tables.json", lambda p: _dump(p, bench.tables))
        emit("schedule", bench.figures, bench.spread, size=asdict(bench.size))


def _dump(path: Path, tables: dict[str, Any]) -> None:
    path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def show(bench: Bench) -> None:
    """The tables, for people."""
    console = Console()
    for name, rows in bench.tables.items():
        if name.startswith(("on_time", "joules")):
            view = Table(title=name, title_justify="left", box=None)
            view.add_column("policy")
            columns = list(next(iter(rows.values())))
            for column in columns:
                view.add_column(column, justify="right")
            for policy, row in rows.items():
                view.add_row(policy, *(f"{row[c]:.3g}" for c in columns))
            console.print(view)
    for name, value in bench.figures.items():
        low, high = bench.spread.get(name, [value, value])
        console.print(f"{name:44s} {value:8.3f}   [{low:.3f}, {high:.3f}]", highlight=False)


if __name__ == "__main__":
    main()
