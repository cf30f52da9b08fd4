"""Cores and memory as this process may use them, and engines seeing each other's threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from perllm.broker.engine import cores
from perllm.broker.engine.cores import ThreadClaim, available_cores, available_memory, cpu_quota, memory_limit


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    file = tmp_path / "cgroup"
    file.write_text("0::/pod/container\n")
    return file


def test_the_tightest_quota_counts(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    group(root, ".", cpu__max="max 100000")
    group(root, "pod", cpu__max="150000 100000")
    group(root, "pod/container", cpu__max="300000 100000")
    assert cpu_quota(root, membership) == 1.5


def test_version_1_groups(tmp_path: Path) -> None:
    root, file = tmp_path / "fs", tmp_path / "cgroup"
    file.write_text("4:cpu,cpuacct:/box\n3:memory:/box\n1:name=systemd:/\n")
    group(root, "cpu/box", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    group(root, "memory/box", memory__limit_in_bytes="1000", memory__usage_in_bytes="400")
    assert cpu_quota(root, file) == 2
    assert memory_limit(root, file) == 600


def test_no_limit_is_none(tmp_path: Path, membership: Path) -> None:
    root = tmp_path / "fs"
    group(root, "pod/container", cpu__max="max 100000", memory__max="max", memory__current="5")
    assert cpu_quota(root, membership) is None
    assert memory_limit(root, membership) is None
    assert cpu_quota(tmp_path / "absent", tmp_path / "none") is None


def test_hyper_threads_count_once(tmp_path: Path) -> None:
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        group(tmp_path, f"cpu{cpu}/topology", thread_siblings_list=siblings)
    assert cores._physical({0, 1, 2, 3}, tmp_path) == 2
    assert cores._physical({0, 2}, tmp_path) == 1
    assert cores._physical({7, 8}, tmp_path) == 2  # no topology shown


def test_this_machine() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert available_memory() > 1 << 20


def test_engines_see_each_others_threads(tmp_path: Path) -> None:
    one, two = ThreadClaim(tmp_path), ThreadClaim(tmp_path)
    one.take(3)
    assert (one.others(), two.others()) == (0, 3)
    two.take(1)
    assert one.others() == 1
    one.take(2)
    assert two.others() == 2
    one.release()
    one.release()
    assert two.others() == 0


def test_a_killed_engines_claim_is_void(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from perllm.broker.engine.cores import ThreadClaim; "
        "claim = ThreadClaim(Path(sys.argv[1])); claim.take(5); print('taken', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        claim = ThreadClaim(tmp_path)
        assert claim.others() == 5
        child.kill()
        child.wait()
        assert claim.others() == 0
    assert not list(tmp_path.iterdir())
