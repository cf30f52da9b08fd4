"""`perllm simulate`, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.simulation import recorded_events

from perllm.scheduler.simulator.trace import write_trace


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perllm.scheduler.simulator", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
    )


def test_the_command_prints_a_table_and_writes_json_and_plot(tmp_path: Path) -> None:
    trace = tmp_path / "x.jsonl"
    write_trace(trace, recorded_events())
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
        [sys.executable, "-m", "perllm.scheduler.simulator", "paper", "--policy", "random", "--seeds", "1000",
         "--load", "0.5", "--tasks", "100"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4]), "FORCE_COLOR": "1"},
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
