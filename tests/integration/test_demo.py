"""`perllm demo` with the real model, in a short form: it ends well, tells what happened, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from support.wait import eventually

PERLLM = str(Path(sys.executable).with_name("perllm"))


def demo(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    tasks = folder / "tasks.jsonl"
    bodies = [{"messages": [{"role": "user", "content": f"Say {n}."}], "max_tokens": 4} for n in range(8)]
    tasks.write_text(
        "\n".join(json.dumps({"custom_id": str(n), "body": b, "deadline": 60}) for n, b in enumerate(bodies))
    )
    return subprocess.Popen(
        [PERLLM, "demo", "--tasks", str(tasks), "--rate", "20", *arguments],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_runs_real_tasks_and_explains_one(tmp_path: Path) -> None:
    running = demo(tmp_path, "--json")
    out, err = running.communicate(timeout=170)
    assert running.returncode == 0, err
    report = json.loads(out)
    assert report["tasks"] == 8
    assert report["states"] == {"succeeded": 8}
    assert sum(n["tasks"] for n in report["nodes"]) == 8
    assert all(n["energy_method"] in ("cpu-model", "rapl", "nvml") for n in report["nodes"])
    assert report["explained"]["candidates"]
    assert not list(tmp_path.glob("perllm-demo-*"))


def test_interrupting_it_leaves_nothing_running(tmp_path: Path) -> None:
    running = demo(tmp_path)
    eventually(lambda: len(psutil.Process(running.pid).children(recursive=True)) >= 6, "everything is started")
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    try:
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    assert "Traceback" not in out + err
    eventually(lambda: not psutil.wait_procs(children, timeout=1)[1], "what it had started ends with it", patience=20)
