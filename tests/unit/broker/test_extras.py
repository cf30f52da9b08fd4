"""What is not installed is named as the extra that brings it, never as a module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WORKER = ["worker", "--concurrency=1"]


@pytest.mark.parametrize(
    ("extras", "command", "told"),
    [
        ("", ["perllm", "demo"], "perllm[server,scheduler,edge,demo]"),
        ("", ["perllm", "simulate", "paper", "--load", "0.5"], "perllm[simulate]"),
        ("", ["perllm.scheduler"], "perllm[scheduler]"),
        ("scheduler", ["perllm.scheduler"], "PERLLM_REDIS_URL"),  # nothing is missing but a server
        ("celery", ["celery", "-A", "perllm.edge_worker", *WORKER], "perllm[edge]"),
    ],
)
def test_an_extra_that_is_missing_is_named(extras: str, command: list[str], told: str, tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.bare", extras, *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "PERLLM_DATA_DIR": str(tmp_path)},
    )
    assert ended.returncode in (1, 2)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "Traceback" not in ended.stderr
