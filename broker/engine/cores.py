"""How many cores, and how much memory, an engine may use here.

llama.cpp's threads spin at barriers: one thread more than there are free cores costs a factor, not a percentage. So
cores are counted as this process may use them (affinity, cgroup quota, hyper-threads counted once), and engines on one
machine see each other's threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

import psutil

_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Physical cores this process may use: its affinity, hyper-threads counted once, within the cgroup's CPU quota."""
    cores = _physical(_affinity())
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def machine_cores() -> int:
    """Physical cores of the machine (or of what the virtual machine shows of it)."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical(cpus: set[int], root: Path = _CPU) -> int:
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add((root / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def cpu_quota(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs the control group allows (version 2, or 1), or None without a limit."""
    quotas = [q for group in _groups(root, membership) if (q := _quota(group)) is not None]
    return min(quotas, default=None)


def memory_limit(root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes the control group still allows to be allocated, or None without a limit."""
    left = [m for group in _groups(root, membership) if (m := _memory_left(group)) is not None]
    return min(left, default=None)


def available_memory() -> int:
    """Bytes this process may still allocate without swapping."""
    free = psutil.virtual_memory().available
    limit = memory_limit()
    return free if limit is None else max(0, min(free, limit))


def _groups(root: Path, membership: Path) -> list[Path]:
    """This process's control group directories and their parents, versions 2 and 1."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for base in [root] if not controllers else [root / name for name in ("cpu", "memory") if name in controllers]:
            here = base / path.lstrip("/")
            groups += [g for g in [here, *here.parents] if g == base or base in g.parents]
    return groups


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _quota(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and quota_us > 0 and period_us else None


def _memory_left(group: Path) -> int | None:
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        most, now = _number(group / limit), _number(group / used)
        if most is not None and now is not None and most < 1 << 60:
            return most - now
    return None


class ThreadClaim:
    """This engine's threads, declared to the other engines on the machine for as long as it lives.

    A claim is a locked file: the kernel drops the lock with the process, so a killed engine leaves nothing behind.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / f"perllm-engines-{os.getuid()}"
        self._file: int | None = None

    def others(self) -> int:
        """Threads other live engines have claimed."""
        total = 0
        for path in self._folder.glob("*.threads") if self._folder.is_dir() else ():
            with contextlib.suppress(OSError, ValueError):
                file = os.open(path, os.O_RDWR)
                try:
                    if _is_free(file):
                        path.unlink()  # left by an engine that died
                    elif path != self._path:
                        total += int(os.read(file, 16))
                finally:
                    os.close(file)
        return total

    def take(self, threads: int) -> None:
        """Claim so many threads, replacing an earlier claim."""
        self.release()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        unnamed = self._path.with_suffix(".new")
        self._file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        os.write(self._file, str(threads).encode())
        unnamed.rename(self._path)  # seen only once it is locked and whole

    def release(self) -> None:
        """Give the claim up. Idempotent."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    @property
    def _path(self) -> Path:
        return self._folder / f"{os.getpid()}-{id(self)}.threads"


def _is_free(file: int) -> bool:
    """Whether nobody holds the lock of an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True
