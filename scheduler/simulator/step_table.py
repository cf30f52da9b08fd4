"""How long an engine step takes and what it draws: measured tables, interpolated.

The scheduler's core assumes a linear form for a step's cost; the simulator must not, or it would only confirm that
assumption. Here a step's time is read from the profiles under `profiles/`: piecewise linear in the batch size between
the measured batches, linear in the context tokens held between the measured contexts (and beyond them), piecewise
linear in the prompt tokens of its prefill chunk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from perllm.broker.errors import BadSetting
from perllm.broker.messages import StepCost

PROFILES = Path(__file__).parent / "profiles"

#: Context per sequence at which llama.cpp's decode rates were measured, tokens: the 256-token prompt and the outputs.
_LLAMACPP_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class StepTable:
    """Step times and power of one engine with up to `slots` sequences. Lists are indexed by the batch size, 0 to slots.

    A decode step of B sequences holding K context tokens in all takes `base[B] + slope[B]·K` s and draws `watts[B]` W
    (idle power included). Power is taken at the batch alone: the profiles show 10 to 15 % of difference between the
    shortest and longest context measured, of which this is the mean.
    """

    base: list[float]  # s
    slope: list[float]  # s per context token held
    watts: list[float]  # W
    prefill_watts: float  # W
    idle_watts: float  # W
    prefill_tokens: list[float]  # tokens, ascending from 0
    prefill_seconds: list[float]  # s for a step that prefills so many tokens and decodes nothing

    def decode(self, active: int, context: float) -> float:
        """Seconds of one decode step."""
        return self.base[active] + self.slope[active] * context

    def prefill(self, tokens: float) -> float:
        """Seconds of a step that only prefills; beyond the last measured point the last slope goes on."""
        xs, ys = self.prefill_tokens, self.prefill_seconds
        for i in range(1, len(xs)):
            if tokens <= xs[i] or i == len(xs) - 1:
                return ys[i - 1] + (ys[i] - ys[i - 1]) * (tokens - xs[i - 1]) / (xs[i] - xs[i - 1])
        raise AssertionError("a table has at least two prefill points")

    def mixed(self, active: int, context: float, prefill: float) -> float:
        """Seconds of one step that decodes `active` sequences and prefills `prefill` tokens: reading the weights is
        paid once, so a chunk adds what it costs beyond an empty prefill."""
        if prefill <= 0:
            return self.decode(active, context)
        if active == 0:
            return self.prefill(prefill)
        return self.decode(active, context) + self.prefill(prefill) - self.prefill_seconds[0]

    def calibration(self, *, prompt: int, output: int) -> StepCost:
        """What a node measures of itself at boot: the linear form fitted over batches up to its slots, at the context
        of a mean task (`prompt`, `output` in tokens)."""
        slots = len(self.base) - 1
        batches = sorted({1, min(2, slots), max(1, slots // 4), max(1, slots // 2), slots})
        contexts = (float(prompt), float(prompt + output))
        rows = [(1.0, b, b * c, self.decode(b, b * c)) for b in batches for c in contexts]
        matrix = np.array([r[:3] for r in rows])
        times = np.array([r[3] for r in rows])
        # Relative errors count alike, so that the single sequence is not lost beside the full batch.
        step, sequence, context = np.linalg.lstsq(matrix / times[:, None], np.ones(len(rows)), rcond=None)[0]
        chunk = float(max(prompt, 1))
        return StepCost(
            step=max(0.0, step),
            sequence=max(0.0, sequence),
            prefill=(self.prefill(chunk) - self.prefill_seconds[0]) / chunk,
            context=max(0.0, context),
        )


def load_table(
    profile: str, slots: int, *, time: float, power: float, cpu_watts: tuple[float, float] | None = None
) -> StepTable:
    """The table of a profile under `profiles/`, named without `.json` (and without `_phases`).

    `time` and `power` scale every measured time and watt (1: the machine as measured). `cpu_watts` is (idle, active)
    for a profile without power readings: a model, not a measurement. Raises BadSetting for an unknown profile or one
    that lacks what is asked for.
    """
    phases, single = PROFILES / f"{profile}_phases.json", PROFILES / f"{profile}.json"
    if phases.is_file():
        points = _vllm(json.loads(phases.read_text()))
    elif single.is_file() and profile.startswith("llamacpp"):
        if cpu_watts is None:
            raise BadSetting(f"profile {profile!r} has no power readings: give idle_watts and active_watts")
        points = _llamacpp(json.loads(single.read_text()), *cpu_watts)
    else:
        raise BadSetting(f"profile: there is no {profile!r}; choose one of {', '.join(profile_names())}")
    batches = np.arange(slots + 1, dtype=float)
    most = max(points.decode)
    if slots > most:
        raise BadSetting(f"slots: profile {profile!r} was measured up to {most} sequences (given {slots})")
    base, slope, watts = (
        np.interp(batches, sorted(points.decode), [points.decode[b][i] for b in sorted(points.decode)])
        for i in range(3)
    )
    return StepTable(
        base=[float(x) * time for x in base],
        slope=[float(x) * time for x in slope],
        watts=[float(x) * power for x in watts],
        prefill_watts=points.prefill_watts * power,
        idle_watts=points.idle * power,
        prefill_tokens=[float(x) for x in points.prefill],
        prefill_seconds=[float(x) * time for x in points.prefill.values()],
    )


def profile_names() -> list[str]:
    """Profiles a scenario can name."""
    names = {p.stem.removesuffix("_phases") for p in PROFILES.glob("*.json")}
    return sorted(names)


@dataclass(frozen=True, slots=True)
class _Measured:
    decode: dict[int, tuple[float, float, float]]  # batch → base s, slope s/token, W
    prefill: dict[float, float]  # tokens → s
    prefill_watts: float
    idle: float  # W


def _vllm(profile: dict[str, Any]) -> _Measured:
    rows = [r for r in profile["rows"] if r["phase"] == "decode"]
    times: dict[int, dict[int, float]] = {}
    watts: dict[int, list[float]] = {}
    for row in rows:
        times.setdefault(row["B"], {})[row["ctx"]] = row["step_s"]
        if row["W"] is not None:
            watts.setdefault(row["B"], []).append(row["W"])
    decode: dict[int, tuple[float, float, float]] = {}
    slope = 0.0
    for batch in sorted(times):
        at = times[batch]
        low, high = min(at), max(at)
        if high > low:  # large batches were measured at short context only: the slope per token held goes on
            slope = (at[high] - at[low]) / ((high - low) * batch)
        decode[batch] = (at[low] - slope * low * batch, slope, sum(watts[batch]) / len(watts[batch]))
    prefill = {0.0: decode[1][0]}
    prefill |= {
        float(r["prompt"]): r["s_per_request"] for r in profile["rows"] if r["phase"] == "prefill" and r["par"] == 1
    }
    prefill_watts = float(np.mean([r["W"] for r in profile["rows"] if r["phase"] == "prefill"]))
    return _Measured(decode, _rising(prefill), prefill_watts, profile["idle_w"])


def _llamacpp(rows: list[dict[str, Any]], idle: float, active: float, threads: int = 12) -> _Measured:
    """The rows at 12 of 16 threads. Context dependence was not measured there; it is taken as none."""
    rows = [r for r in rows if r["threads"] == threads]
    decode = {r["seqs"]: (r["seqs"] / r["decode_tok_s"], 0.0, active) for r in rows}
    prefill = {0.0: 0.0} | {
        float(_LLAMACPP_CONTEXT * r["seqs"]): _LLAMACPP_CONTEXT * r["seqs"] / r["prefill_tok_s"] for r in rows
    }
    return _Measured(decode, _rising(prefill), active, idle)


def _rising(points: dict[float, float]) -> dict[float, float]:
    """The points in order, each at least as costly as the one before: a short prompt's time below a bare decode step
    is noise."""
    ordered = dict(sorted(points.items()))
    for before, after in pairwise(ordered):
        ordered[after] = max(ordered[after], ordered[before])
    return ordered
