"""Scenario and trace files: what is right is read as it is, what is wrong gets one line that says where."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.errors import BadSetting
from perllm.broker.messages import Completed, Energy, Event, NodeUp, Receipt, State, Submitted
from perllm.scheduler.simulator.run import Simulation
from perllm.scheduler.simulator.scenario import (
    SCENARIOS,
    load_scenario,
    names_of,
    parse_scenario,
    scenario_names,
)
from perllm.scheduler.simulator.trace import arrivals_of, read_trace, stretched, write_trace

PAPER_TEXT = (SCENARIOS / "paper.toml").read_text()
PAPER = tomllib.loads(PAPER_TEXT)


# --- scenarios


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
        assert len({n for s in scenario.node for n in names_of(s)}) >= 1
        return
    assert said.startswith("scenario my.toml: ")
    assert "\n" not in said


# --- traces


def events() -> list[Event]:
    seen: list[Event] = []
    scenario = load_scenario("paper").model_copy(update={"tasks": 120, "start": 1000.0})
    Simulation(scenario, "round-robin+mech", load=1.2, seed=2, listen=seen.append).run()
    return seen


EVENTS = events()


def test_a_trace_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    assert write_trace(path, EVENTS) == len(EVENTS)
    assert [e.model_dump_json() for e in read_trace(path)] == [e.model_dump_json() for e in EVENTS]
    assert list(path.parent.iterdir()) == [path]


def test_a_replay_has_the_tasks_that_were_there(tmp_path: Path) -> None:
    truth = {a.event.id: a for a in Simulation(load_scenario("paper").model_copy(update={"tasks": 120}),
                                                "random", load=1.2, seed=2).arrivals}  # fmt: skip
    replayed = arrivals_of(EVENTS)
    assert {a.event.id for a in replayed} == set(truth)
    done = {e.id: e for e in EVENTS if isinstance(e, Completed)}
    whole = cut = 0
    for arrival in replayed:
        original = truth[arrival.event.id]
        assert arrival.event.deadline - arrival.event.at == pytest.approx(original.event.deadline - original.event.at)
        ended = done.get(arrival.event.id)
        if ended is not None and ended.state is State.SUCCEEDED:
            assert arrival.output == original.output
            whole += 1
        elif ended is not None and ended.receipt.completion_tokens:
            assert arrival.output > ended.receipt.completion_tokens
            cut += 1
    assert whole > 20
    assert cut > 5
    gaps = [b.event.at - a.event.at for a, b in pairwise(replayed)]
    wide = stretched(replayed, 2.0, 50.0)
    assert wide[0].event.at == 50.0
    assert [b.event.at - a.event.at for a, b in pairwise(wide)] == pytest.approx([2 * g for g in gaps])
    assert [a.event.deadline - a.event.at for a in wide] == pytest.approx(
        [a.event.deadline - a.event.at for a in replayed]
    )


def test_a_cut_task_without_longer_ones_runs_to_its_limit() -> None:
    receipt = Receipt(
        node="n", model="m", attempt=1, completion_tokens=50, energy=Energy(method="emulated", estimated=True)
    )
    log = [
        Submitted(at=5.0, id="a", deadline=9.0, max_tokens=300),
        Completed(
            at=9.0,
            id="a",
            node="n",
            attempt=1,
            state=State.EXPIRED,
            on_time=False,
            latency=4,
            queued=0,
            receipt=receipt,
        ),
    ]
    (only,) = arrivals_of(log)
    assert (only.output, only.event.at, only.event.deadline) == (300, 0.0, 4.0)


GOOD = Submitted(at=1.0, id="a", deadline=2.0).model_dump_json()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "line 1: not a PerLLM trace"),
        ([GOOD], "line 1: not a PerLLM trace"),
        (['{"perllm_trace": 9}'], "line 1: version 9 of the format; this program reads 1"),
        (['{"perllm_trace": 1}', GOOD, "{"], "line 3: "),
        (['{"perllm_trace": 1}', "", '{"type": "submitted", "at": 1, "id": "a"}'], "line 3: submitted.deadline: Field"),
        (['{"perllm_trace": 1}', GOOD.replace('"at":1.0', '"at":-1.0')], "line 2: at: a time cannot be negative"),
        (['{"perllm_trace": 1}', GOOD.replace('"deadline":2.0', '"deadline":0.5')], "line 2: deadline: not after"),
        (['{"perllm_trace": 1}', GOOD.replace('"max_tokens":128', '"max_tokens":0')], "line 2: max_tokens: must be"),
        (['{"perllm_trace": 1}', GOOD.replace('"payload_bytes":0', '"payload_bytes":-1')], "line 2: submitted.payload"),
        (['{"perllm_trace": 1}', GOOD.replace('"type":"submitted"', '"type":"eaten"')], "line 2: "),
    ],
)
def test_a_wrong_trace_says_which_line(tmp_path: Path, lines: list[str], says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BadSetting, match=re.escape(f"trace {path}, {says}")):
        read_trace(path)


def test_a_trace_without_tasks_is_refused() -> None:
    with pytest.raises(BadSetting, match="no task was submitted"):
        arrivals_of([e for e in EVENTS if isinstance(e, NodeUp)])


def test_a_trace_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("before")

    def broken() -> Any:
        yield EVENTS[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(BadSetting, match="No space left"):
        write_trace(path, broken())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# --- the command


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perllm.scheduler.simulator", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_the_command_prints_a_table_and_writes_json_and_plot(tmp_path: Path) -> None:
    trace = tmp_path / "x.jsonl"
    write_trace(trace, EVENTS)
    done = command("paper", "--policy", "random,least-loaded+mech", "--seeds", "2", "--load", "0.5,0.9", "--tasks",
                   "100", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "least-loaded+mech" in done.stdout
    written = json.loads((tmp_path / "perllm-simulation" / "paper.json").read_text())
    assert len(written["runs"]) == 8
    assert set(written["effective_capacity"]) == {"random", "least-loaded+mech"}
    assert (tmp_path / "perllm-simulation" / "paper.png").read_bytes().startswith(b"\x89PNG")
    replay = command("paper", "--policy", "random", "--seeds", "1", "--trace", str(trace), "--json", cwd=tmp_path)
    (run,) = json.loads(replay.stdout)["runs"]
    assert run["tasks"] == 120
    assert run["load"] == pytest.approx(1.2, rel=0.15)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["paper", "--policy", "best"], "there is no 'best'; choose one of"),
        (["papr"], "there is no 'papr'"),
        (["paper", "--policy", "random", "--load", "-1"], "--load: shares of capacity must be above 0"),
        (["paper", "--policy", "random", "--load", "x"], "--load: give numbers"),
        (["paper", "--policy", ","], "--policy: name at least one"),
        (["paper", "--policy", "random", "--trace", "none.jsonl"], "trace none.jsonl: No such file"),
        (["paper", "--policy", "random", "--tasks", "10", "--out", "/proc/x"], "output /proc/x"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, args: list[str], says: str) -> None:
    done = command(*args, cwd=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_what_has_finished(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "perllm.scheduler.simulator", "paper", "--policy", "random", "--seeds", "1000", "--load", "0.5",
         "--tasks", "100"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "FORCE_COLOR": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    while not re.search(r"\b([2-9]|\d\d+)/1000", seen):  # the progress bar says two have finished
        piece = process.stderr.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 130
    assert "of 1000 runs finished and kept" in err
    kept = json.loads((tmp_path / "perllm-simulation" / "paper.json").read_text())
    assert 2 <= len(kept["runs"]) < 1000
    assert "random" in out
