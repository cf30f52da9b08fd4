"""The processes of an engine end with the worker, however it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from support.wait import eventually

#: A worker that starts an "engine", tells its process id, and waits.
WORKER = """
import subprocess, sys
from perllm.cloud_worker.reaper import Reaper

reaper = Reaper()
reaper.watch()
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
reaper.started()
print(engine.pid, flush=True)
if sys.stdin.readline() == "close\\n":
    reaper.close()
    print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def engine_of(worker: subprocess.Popen[str]) -> psutil.Process:
    assert worker.stdout is not None
    return psutil.Process(int(worker.stdout.readline()))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_they_die_with_a_killed_worker(worker: subprocess.Popen[str]) -> None:
    engine = engine_of(worker)
    assert not gone(engine)
    worker.kill()
    eventually(lambda: gone(engine), "the engine's process is gone")


def test_whatever_is_left_of_a_closed_engine_is_killed(worker: subprocess.Popen[str]) -> None:
    engine = engine_of(worker)
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("close\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == "closed\n"
    eventually(lambda: gone(engine), "the engine's process is gone")
    assert worker.poll() is None
