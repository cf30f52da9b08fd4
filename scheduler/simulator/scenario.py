"""A scenario: nodes, their links and faults, and the work that arrives. One readable TOML file each.

Packaged scenarios are named without path (`paper`, `measured`, and those with faults, see `scenario_names`); any other
is the path of a file. Units: s, bytes/s, W, J, tokens.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from perllm.broker.errors import BadSetting, field_errors
from perllm.broker.messages import Finite, Name, NodeName, NonNegative

SCENARIOS = Path(__file__).parent / "scenarios"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- distributions


class Constant(_Part):
    """Always `value`."""

    kind: Literal["constant"] = "constant"
    value: Positive


class Uniform(_Part):
    """Uniform between `low` and `high`."""

    kind: Literal["uniform"] = "uniform"
    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError("high is below low")
        return self


class Lognormal(_Part):
    """Lognormal with this median and σ of the logarithm, cut at `most`."""

    kind: Literal["lognormal"] = "lognormal"
    median: Positive
    sigma: NonNegative
    most: Positive | None = None


class Pareto(_Part):
    """Pareto: at least `least`, tail index `alpha` (above 1, so that there is a mean), cut at `most`."""

    kind: Literal["pareto"] = "pareto"
    least: Positive
    alpha: Annotated[float, Field(gt=1, allow_inf_nan=False)]
    most: Positive | None = None


Distribution = Annotated[Constant | Uniform | Lognormal | Pareto, Field(discriminator="kind")]


# --- the cluster


class Link(_Part):
    """A node's link, shared equally by the transfers on it. Its bandwidth is drawn anew every `every` s, uniformly
    within ±`fluctuation` of `bandwidth`."""

    bandwidth: Positive  # bytes/s
    fluctuation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    every: Positive = 1.0  # s
    joules_per_byte: NonNegative = 0.0


class NodeSpec(_Part):
    """One node, or `count` alike ones (then named name-1, name-2, …).

    `profile` names a measured table; `time` and `power` scale it, to stand for other hardware of the same shape.
    `noise` is the σ of the logarithm of the speed, drawn every 0.5 s; `drift` that of a slow wandering (correlation
    time `drift_time`).
    """

    name: NodeName
    tier: Literal["edge", "cloud"]
    profile: str
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    time: Positive = 1.0
    power: Positive = 1.0
    idle_watts: NonNegative | None = None
    active_watts: NonNegative | None = None
    slots: Annotated[int, Field(ge=1, le=256)]
    context: Annotated[int, Field(ge=64)] = 4096  # tokens
    kv_tokens: Annotated[int, Field(ge=64)]
    chunk: Annotated[int, Field(ge=1)]  # prompt tokens prefilled per step
    link: Link
    noise: Annotated[float, Field(ge=0, le=1)] = 0.05
    drift: Annotated[float, Field(ge=0, le=1)] = 0.0
    drift_time: Positive = 120.0

    @model_validator(mode="after")
    def _kv_holds_one(self) -> Self:
        if self.kv_tokens < self.context:
            raise ValueError(f"kv_tokens ({self.kv_tokens}) cannot hold one full context ({self.context})")
        return self


# --- what goes wrong


class _Fault(_Part):
    start: NonNegative  # s from the beginning
    end: Positive  # s

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.end <= self.start:
            raise ValueError("end is not after start")
        return self


class Slow(_Fault):
    """The named nodes' steps take `factor` times as long."""

    kind: Literal["slow"]
    nodes: Annotated[tuple[NodeName, ...], Field(min_length=1)]
    factor: Positive


class Rotate(_Fault):
    """One node after the other is slowed by `factor`, each for `every` s."""

    kind: Literal["rotate"]
    nodes: Annotated[tuple[NodeName, ...], Field(min_length=1)]
    factor: Positive
    every: Positive


class Narrow(_Fault):
    """The named nodes' links carry `factor` times their bandwidth (below 1: less)."""

    kind: Literal["narrow"]
    nodes: Annotated[tuple[NodeName, ...], Field(min_length=1)]
    factor: Positive


class Stalls(_Fault):
    """The named nodes freeze now and then for `lasting` s: exponential gaps of `every` s in the mean."""

    kind: Literal["stalls"]
    nodes: Annotated[tuple[NodeName, ...], Field(min_length=1)]
    every: Positive
    lasting: Positive


class Loss(_Fault):
    """The named nodes die at `start` with all they hold and are back, empty, at `end`."""

    kind: Literal["loss"]
    nodes: Annotated[tuple[NodeName, ...], Field(min_length=1)]


Fault = Annotated[Slow | Rotate | Narrow | Stalls | Loss, Field(discriminator="kind")]


# --- the work


class Hint(_Part):
    """A producer's guess of the output length: given with `share` of the tasks, off by a lognormal of `sigma`."""

    share: Share
    sigma: NonNegative


class ServiceClass(_Part):
    """One service class. `share` is its part of all tasks (shares are normalised)."""

    name: Name
    share: Positive
    prompt: Distribution  # tokens
    output: Distribution  # tokens
    deadline: Distribution  # s from submission
    max_tokens: Annotated[int, Field(ge=1)]
    payload: Distribution = Constant(value=1024)  # bytes, text and attachments
    value: Positive = 1.0
    hint: Hint | None = None


class Poisson(_Part):
    """Independent arrivals."""

    kind: Literal["poisson"] = "poisson"


class Mmpp(_Part):
    """Two-state Markov-modulated Poisson arrivals: `burst` times the calm rate for `busy` s in the mean, then `calm` s
    at the calm rate. The mean rate is the load's."""

    kind: Literal["mmpp"]
    burst: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 4.0
    busy: Positive = 10.0
    calm: Positive = 30.0


class Replay(_Part):
    """Arrival times and sizes of a recorded trace, times stretched so that its mean rate is the load's. `file` is a
    packaged trace's name or a path. Deadlines, payloads and values come from the classes."""

    kind: Literal["replay"]
    file: str


class Texts(_Part):
    """Recorded prompts with the lengths of their answers, drawn without repetition, arriving as Poisson's. `file` is a
    packaged trace's name or a path (`text_trace`). A prompt's class is that of its service where one has its name;
    others, and all deadlines, payloads and values, come from the classes by their shares."""

    kind: Literal["texts"]
    file: str


Arrivals = Annotated[Poisson | Mmpp | Replay | Texts, Field(discriminator="kind")]


class Scenario(_Part):
    """Everything one simulation needs but the policy, the load and the seed.

    `tasks` arrive at `load` times the cluster's capacity. The capacity (tasks/s) is what all nodes finish together
    when every slot is always taken by the mean task, at measured speeds (see `capacity`).
    """

    title: str
    tasks: Annotated[int, Field(ge=1, le=10_000_000)] = 2000
    loads: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3)
    arrivals: Arrivals = Poisson()
    node: Annotated[tuple[NodeSpec, ...], Field(min_length=1)]
    service: Annotated[tuple[ServiceClass, ...], Field(min_length=1)]
    hint: Hint | None = None  # for the classes that have none of their own
    fault: tuple[Fault, ...] = ()
    boot_error: dict[str, Positive] = Field(default_factory=dict)  # node → factor on the step times it announces
    heartbeat: Positive = 1.0  # s
    lease: Positive = 4.0  # s until a dead node's tasks are pending again
    dispatch_delay: NonNegative = 0.003  # s from a decision to the node's queue
    queue_room: Annotated[int, Field(ge=0)] = 2  # tasks a node's queue holds beyond its slots (with mechanisms)
    start: Finite = 0.0  # s, the clock's first reading

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [name for spec in self.node for name in node_names(spec)]
        if len(set(names)) < len(names):
            raise ValueError("two nodes have the same name")
        classes = [s.name for s in self.service]
        if len(set(classes)) < len(classes):
            raise ValueError("two service classes have the same name")
        named = {f"fault.{i}.nodes": set(fault.nodes) for i, fault in enumerate(self.fault)}
        for key, given in (named | {"boot_error": set(self.boot_error)}).items():
            if unknown := sorted(given - set(names)):
                raise ValueError(f"{key}: there is no node {unknown[0]!r}; nodes are {', '.join(names)}")
        return self


def node_names(spec: NodeSpec) -> list[str]:
    """The names of the nodes one [[node]] entry stands for."""
    return [spec.name] if spec.count == 1 else [f"{spec.name}-{i}" for i in range(1, spec.count + 1)]


def scenario_names() -> list[str]:
    """The packaged scenarios."""
    return sorted(p.stem for p in SCENARIOS.glob("*.toml"))


def load_scenario(name_or_path: str) -> Scenario:
    """Read a packaged scenario by name or a file by path. Raises BadSetting naming the file and the key or line."""
    return parse_scenario(*_text(name_or_path))


def parse_scenario(text: str, where: str) -> Scenario:
    """A scenario from TOML text; `where` names the source in errors. Raises BadSetting.

    A key `base` names a scenario to start from: keys given here replace that one's.
    """
    data = _table(text, where)
    if (base := data.pop("base", None)) is not None:
        if not isinstance(base, str):
            raise BadSetting(f"scenario {where}: base: give the name of a scenario")
        inherited = _table(*_text(base))
        if "base" in inherited:
            raise BadSetting(f"scenario {where}: base: {base!r} has a base itself")
        data = inherited | data
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise BadSetting(f"scenario {where}: {field_errors(error)}") from None


def _text(name_or_path: str) -> tuple[str, str]:
    """A scenario file's text and path."""
    path = Path(name_or_path)
    if "/" not in name_or_path and path.suffix != ".toml":
        path = SCENARIOS / f"{name_or_path}.toml"
        if not path.is_file():
            raise BadSetting(
                f"scenario: there is no {name_or_path!r}; "
                f"choose one of {', '.join(scenario_names())}, or give a .toml file"
            )
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except OSError as error:
        raise BadSetting(f"scenario {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadSetting(f"scenario {path}: not UTF-8 text") from None


def _table(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadSetting(f"scenario {where}: not valid TOML: {error}") from None
