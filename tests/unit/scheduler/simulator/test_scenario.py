"""Scenario files: what is right is read as it is, what is wrong gets one line that says where."""

from __future__ import annotations

import copy
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.errors import BadSetting
from perllm.scheduler.simulator.scenario import (
    SCENARIOS,
    load_scenario,
    node_names,
    parse_scenario,
    scenario_names,
)
from perllm.scheduler.simulator.simulation import Simulation

PAPER_TEXT = (SCENARIOS / "paper.toml").read_text()
PAPER = tomllib.loads(PAPER_TEXT)


@pytest.mark.parametrize("name", scenario_names())
def test_packaged_scenarios_are_read(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.title
    assert {"edge", "cloud"} == {n.tier for n in scenario.node}


def without(path: list[Any]) -> dict[str, Any]:
    raw = copy.deepcopy(PAPER)
    at = raw
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return raw


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(PAPER)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return raw


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(BadSetting) as caught:
        parse_scenario(dumped(raw), "my.toml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("scenario my.toml: ")
    return str(caught.value)


def dumped(raw: dict[str, Any]) -> str:
    """TOML of a scenario: enough of the language for these."""

    def value(v: Any) -> str:
        if isinstance(v, bool):
            return str(v).lower()
        if isinstance(v, dict):
            return "{" + ", ".join(f'"{k}" = {value(x)}' for k, x in v.items()) + "}"
        if isinstance(v, list | tuple):
            return "[" + ", ".join(value(x) for x in v) + "]"
        if isinstance(v, float) and math.isnan(v):
            return "nan"
        return json.dumps(v, ensure_ascii=False) if isinstance(v, str) else repr(v)

    return "\n".join(f'"{k}" = {value(v)}' for k, v in raw.items())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (without(["node"]), "node: Field required"),
        (without(["node", 0, "slots"]), "node.0.slots: Field required"),
        (changed(["node"], []), "node: Tuple should have at least 1 item"),
        (changed(["node", 5, "slots"], 0), r"node.5.slots: Input should be greater than or equal to 1 (given 0)"),
        (changed(["node", 1, "link", "bandwidth"], -1), "node.1.link.bandwidth: Input should be greater than 0"),
        (changed(["node", 0, "speed"], 1), "node.0.speed: Extra inputs are not permitted"),
        (changed(["node", 0, "name"], "edge-2"), "two nodes have the same name"),
        (changed(["node", 0, "kv_tokens"], 100), "node.0: kv_tokens (100) cannot hold one full context (4096)"),
        (changed(["service", 0, "deadline"], {"kind": "uniform", "low": -2, "high": 6}), "service.0.deadline"),
        (changed(["service", 0, "deadline"], {"kind": "uniform", "low": 7, "high": 6}), "high is below low"),
        (changed(["service", 2, "output", "alpha"], 1.0), "service.2.output.pareto.alpha"),
        (changed(["fault"], [{"kind": "slow", "nodes": ["edge-9"], "factor": 2, "start": 0, "end": 9}]), "'edge-9'"),
        (changed(["fault"], [{"kind": "slow", "nodes": ["edge-1"], "factor": 2, "start": -1, "end": 9}]), "start"),
        (changed(["fault"], [{"kind": "loss", "nodes": ["edge-1"], "start": 9, "end": 3}]), "end is not after start"),
        (changed(["boot_error"], {"nowhere": 2.0}), "boot_error: there is no node 'nowhere'"),
        (changed(["tasks"], float("nan")), "tasks"),
        (changed(["base"], "nowhere"), "there is no 'nowhere'"),
    ],
)
def test_a_wrong_scenario_says_which_key(raw: dict[str, Any], says: str) -> None:
    if "nowhere" in says and "base" in raw:
        with pytest.raises(BadSetting, match="choose one of"):
            parse_scenario(dumped(raw), "my.toml")
        return
    assert says in message(raw)


def test_a_syntax_error_says_which_line() -> None:
    with pytest.raises(BadSetting, match=r"scenario my.toml: not valid TOML: .*line 3"):
        parse_scenario("title = 'x'\n\nnode = [ } ]", "my.toml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"nothing.toml: No such file"):
        load_scenario(str(tmp_path / "nothing.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadSetting, match="not UTF-8"):
        load_scenario(str(tmp_path / "binary.toml"))
    with pytest.raises(BadSetting, match=r"there is no 'papr'; choose one of .*paper"):
        load_scenario("papr")


def test_an_unknown_profile_is_named() -> None:
    scenario = parse_scenario(dumped(changed(["node", 0, "profile"], "tpu")), "x")
    with pytest.raises(BadSetting, match="no 'tpu'; choose one of llamacpp"):
        Simulation(scenario, "random", load=1, seed=0)


def test_a_base_is_started_from_and_replaced_key_by_key() -> None:
    scenario = parse_scenario('base = "paper"\ntitle = "mine"\ntasks = 7', "x")
    assert (scenario.title, scenario.tasks) == ("mine", 7)
    assert scenario.node == load_scenario("paper").node


paths = st.sampled_from(
    [[k] for k in PAPER]
    + [["node", i, k] for i, n in enumerate(PAPER["node"]) for k in n]
    + [["node", 0, "link", k] for k in PAPER["node"][0]["link"]]
    + [["service", i, k] for i, s in enumerate(PAPER["service"]) for k in s]
    + [["service", i, "output", k] for i, s in enumerate(PAPER["service"]) for k in s["output"]]
)
junk = st.one_of(
    st.none().map(lambda _: []),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(width=32),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=8),
    st.just({}),
    st.just([{}]),
)


@given(paths, junk)
def test_any_junk_is_either_a_scenario_or_one_clear_line(path: list[Any], value: Any) -> None:
    try:
        scenario = parse_scenario(dumped(changed(path, value)), "my.toml")
    except BadSetting as error:
        said = str(error)
    else:
        assert len({n for s in scenario.node for n in node_names(s)}) >= 1
        return
    assert said.startswith("scenario my.toml: ")
    assert "\n" not in said
