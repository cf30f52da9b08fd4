"""`make bench-schedule`: where CS-UCB wins in the simulator, by how much, and where it does not.

Every policy meets the same arrivals, noise and faults per seed; the seeds (from 1000 on) were not used for tuning.
Ratios are medians over seeds, with [lowest, highest] as their spread. What the figures mean:

- `capacity_over_*`: effective capacity (highest load with at least 80 % of tasks on time) over another policy's, in
  the `paper` scenario with Poisson arrivals; `*_bursts`: the same with MMPP arrivals. `best_heuristic` is the best of
  round robin, least loaded, power of two, cheapest feasible and earliest completion, each as it is and with CS-UCB's
  mechanisms; `best_jsq` leaves out the two that forecast with the nodes' boot profiles.
- `ontime_vs_informed_min`: the on-time share over the informed oracle's, the least over loads up to 90 % and both
  arrivals.
- `ontime_vs_clairvoyant_*`, `energy_vs_clairvoyant_*`: the on-time share over that of the best schedule known with
  everything known in advance (`simulator.clairvoyant`), and the energy over what such schedules need *for the same
  on-time share*; idle power apart. `of_bound_*`: the on-time share over what no policy can exceed
  (`simulator.bound`), the least over scenarios at that load; the table `yardstick` has them all.
- `dominated_points_on_time`, `dominated_energy_percent`: over all scenarios and loads of that table, by how much a
  policy without foresight is better in on-time share at no more energy per on-time task, or in that energy at no less
  on time: the worst case, and [least, most] over scenarios and loads.
- `recovery_tasks_max`: tasks from a fault on until the on-time share of the next 50 tasks, and of all the rest, is
  within 3 points of the informed oracle's under the same fault; the worst of three faults.
- `worst_points_vs_best_heuristic`: on-time share less the best simple heuristic's, points; the worst scenario and
  load.
- `wrong_profile_points`: points lost to wrong boot profiles after the first 100 tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
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
from perllm.scheduler.simulator.scenario import Scenario, Texts, load_scenario, scenario_names
from perllm.scheduler.simulator.simulation import Simulation
from perllm.scheduler.simulator.sweep import RunSpec, sweep
from perllm.scheduler.simulator.yardstick import Yardstick, measure

FIRST_SEED = 1000
OURS = "cs-ucb"
JSQ = ("round-robin", "least-loaded", "power-of-two")
FORECASTING = ("cheapest-feasible", "earliest-completion")
HEURISTICS = tuple(f"{name}{mech}" for name in (*JSQ, *FORECASTING) for mech in ("", "+mech"))
COMPARED = (OURS, "foresight", "informed", "cs-ucb-paper", "cs-ucb-paper+mech", "cloud-only+mech", *HEURISTICS)
#: What the yardstick is put beside, and where.
MEASURED = (
    OURS,
    "cs-ucb-paper+mech",
    "earliest-completion+mech",
    "cheapest-feasible+mech",
    "least-loaded+mech",
    "cloud-only+mech",
)
YARDSTICK = (
    "paper",
    "paper-bursts",
    "measured",
    "measured-bursts",
    "azure-code",
    "long-prompts",
    "heavy-tails",
    "mixed-values",
    "slow-giant",
    "billed-cloud",
    "texts",
)
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
    yard_seeds: int
    yard_tasks: int
    yard_loads: tuple[float, ...]


FULL = Size(
    seeds=4,
    weak_seeds=2,
    fault_seeds=16,
    agod_runs=40,
    tasks=None,
    loads=LOADS,
    yard_seeds=3,
    yard_tasks=1200,
    yard_loads=(0.3, 0.5, 0.7, 0.9, 1.1),
)
QUICK = Size(
    seeds=1,
    weak_seeds=1,
    fault_seeds=4,
    agod_runs=8,
    tasks=1500,
    loads=(0.3, 0.5, 0.7, 0.9, 1.1, 1.3),
    yard_seeds=1,
    yard_tasks=300,
    yard_loads=(0.5, 0.9),
)

#: Runs by (policy, load), one per seed.
SweepResult = dict[tuple[str, float], list[RunResult]]


class Bench:
    """Runs simulations and keeps what the figures need of them."""

    def __init__(self, size: Size, jobs: int, texts: str | None = None) -> None:
        self.size, self.jobs, self.texts = size, jobs, texts
        self.figures: dict[str, float] = {}
        self.spread: dict[str, list[float]] = {}
        self.tables: dict[str, Any] = {}
        self.console = Console(stderr=True)

    def scenario(self, name: str) -> Scenario:
        scenario = load_scenario(name)
        if self.texts is not None and isinstance(scenario.arrivals, Texts):
            arrivals = scenario.arrivals.model_copy(update={"file": self.texts})
            scenario = scenario.model_copy(update={"arrivals": arrivals, "tasks": 3000})
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
            least_against_informed += [ratios(swept, load, "informed") for load in (0.3, 0.5, 0.7, 0.9)]
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
            "foresight": ("foresight",),
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

    def yardstick(self) -> None:
        """Beside the best schedules known and the bound, everywhere work is of its own kind."""
        size = self.size
        jobs = [(n, x, FIRST_SEED + s) for n in YARDSTICK for x in size.yard_loads for s in range(size.yard_seeds)]
        found: dict[tuple[str, float], list[Yardstick]] = {}
        with ProcessPoolExecutor(self.jobs) as pool:
            scenarios = {n: self.scenario(n) for n in YARDSTICK}
            scenarios = {n: s.model_copy(update={"tasks": min(s.tasks, size.yard_tasks)}) for n, s in scenarios.items()}
            running = [(n, x, pool.submit(measure, scenarios[n], MEASURED, load=x, seed=s)) for n, x, s in jobs]
            for number, (name, load, future) in enumerate(running, start=1):
                found.setdefault((name, load), []).append(future.result())
                print(f"  yardstick: {number} of {len(jobs)}, {name} at {load:.0%}", file=sys.stderr, flush=True)
        self.tables["yardstick"] = {f"{name} at {load:.0%}": yard_row(some) for (name, load), some in found.items()}
        for (name, load), some in found.items():
            if name not in ("paper", "paper-bursts"):
                continue
            suffix = f"{load:.0%}".replace("%", "") + ("_bursts" if name == "paper-bursts" else "")
            self.put(f"ontime_vs_clairvoyant_{suffix}", [yard.policies[0].of_clairvoyant for yard in some])
            self.put(f"energy_vs_clairvoyant_{suffix}", [yard.policies[0].joules_of_clairvoyant for yard in some])
        for load in size.yard_loads:
            at_load = [[yard.policies[0].of_bound for yard in some] for (_, x), some in found.items() if x == load]
            self.put(f"of_bound_{load:.0%}".replace("%", ""), min(at_load, key=statistics.median))
        dominated = [row["dominated"] for row in self.tables["yardstick"].values()]
        for figure, key in (("dominated_points_on_time", "points"), ("dominated_energy_percent", "energy_percent")):
            worst = [row[key] for row in dominated]
            self.figures[figure], self.spread[figure] = max(worst), [min(worst), max(worst)]
        plot_frontiers(RESULTS / "schedule-frontiers.png", found)

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


def yard_row(some: Sequence[Yardstick]) -> dict[str, Any]:
    """Means over seeds, a row per policy; by how much another policy without foresight dominates ours."""
    rows: dict[str, Any] = {}
    for runs in zip(*((*yard.policies, yard.clairvoyant) for yard in some), strict=True):
        good = statistics.mean(run.on_time for run in runs)
        rows[runs[0].policy] = {
            "on_time": good,
            "value": statistics.mean(run.share for run in runs),
            "joules": statistics.mean(run.joules for run in runs) / good if good else math.inf,  # per on-time share
            "of_bound": statistics.mean(run.of_bound for run in runs),
            "energy_vs_clairvoyant": statistics.mean(run.joules_of_clairvoyant for run in runs),
            "energy_vs_bound": statistics.mean(run.joules_of_bound for run in runs),
        }
    points, percent = dominated(rows[OURS], [row for name, row in rows.items() if name not in (OURS, "clairvoyant")])
    rows["bound"] = {"value": statistics.mean(yard.bound_share for yard in some)}
    rows["dominated"] = {"points": points, "energy_percent": percent}
    return rows


def dominated(ours: dict[str, float], others: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Points of on-time value another has more at no more energy, and percent of energy it has less at no less value;
    0 where none does."""
    cheaper = [row["value"] - ours["value"] for row in others if row["joules"] <= ours["joules"]]
    better = [1 - row["joules"] / ours["joules"] for row in others if row["value"] >= ours["value"]]
    return 100 * max(0.0, *cheaper, 0.0), 100 * max(0.0, *better, 0.0)


def plot_frontiers(path: Path, found: dict[tuple[str, float], list[Yardstick]]) -> None:
    """Energy against on-time share, the first seed: clairvoyant's frontier, the bound's share, a point per policy; a
    plot per scenario, at 90 % load."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = {name: some[0] for (name, load), some in found.items() if load == 0.9}
    figure = Figure(figsize=(14, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 4, squeeze=False).ravel()
    for plot, (name, yard) in zip(axes, shown.items(), strict=False):
        plot.plot([100 * x for x, _ in yard.frontier], [y / 1000 for _, y in yard.frontier], ".-", label="clairvoyant")
        for i, run in enumerate(yard.policies):
            plot.plot([100 * run.share], [run.joules / 1000], "o*sv^D"[i % 6], label=run.policy)
        plot.axvline(100 * yard.bound_share, color="grey", linestyle=":", label="bound")
        plot.set(title=name, xlabel="on-time value, %", ylabel="kJ in all")
    for plot in axes[len(shown) :]:
        plot.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize="small")
    write_atomically(path, lambda p: figure.savefig(p, dpi=110))


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
    parts = (
        "compare",
        "others",
        "agod",
        "yardstick",
        "everywhere",
        "recovery",
        "profiles",
        "ablation",
        "regret",
        "speed",
    )
    parser.add_argument("--only", choices=parts, action="append", help="leave the other parts out; nothing is kept")
    parser.add_argument("--texts", help="prompts to replay instead of the packaged ones, as JSON lines")
    options = parser.parse_args()
    bench = Bench(QUICK if options.quick else FULL, options.jobs, options.texts)
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
    if rows := bench.tables.get("yardstick"):
        columns = ("on_time", "value", "joules", "of_bound", "energy_vs_clairvoyant", "energy_vs_bound")
        view = Table(title="yardstick (joules: of the run, over the on-time share)", title_justify="left", box=None)
        for column in ("where", "policy", *columns):
            view.add_column(column, justify="right")
        for where, row in rows.items():
            for policy, figures in row.items():
                if policy != "dominated":
                    view.add_row(where, policy, *(f"{figures[c]:.4g}" if c in figures else "" for c in columns))
            points, percent = row["dominated"]["points"], row["dominated"]["energy_percent"]
            view.add_row(where, f"dominated by {points:.2f} points, {percent:.1f} % of energy")
        console.print(view)
    for name, value in bench.figures.items():
        low, high = bench.spread.get(name, [value, value])
        console.print(f"{name:44s} {value:8.3f}   [{low:.3f}, {high:.3f}]", highlight=False)


if __name__ == "__main__":
    main()
