"""Build the environments of `make test-clients` under .build/clients, one for each lock in tests/clients. Standard
library only. What cannot be installed here (no registry, no Node) is named, and its clients' tests are skipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "tests" / "clients"
BUILD = ROOT / ".build" / "clients"


def main() -> None:
    for lock in sorted(LOCKS.glob("*.txt")):
        build(lock, BUILD / lock.stem, python_packages)
    build(LOCKS / "package-lock.json", BUILD / "node", node_packages)


def build(lock: Path, folder: Path, install: Callable[[Path, Path], None]) -> None:
    """Install what `lock` names into `folder`, unless that is there already."""
    complete = folder / ".complete"
    if complete.exists() and complete.read_bytes() == lock.read_bytes():
        return
    print(f"installing the clients of {lock.name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        install(lock, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{folder.name}: could not be installed, its clients are not tested: {error}", file=sys.stderr)
    else:
        shutil.copy(lock, complete)


def python_packages(lock: Path, folder: Path) -> None:
    run(folder, sys.executable, "-m", "venv", str(folder))
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    run(folder, *pip, "install", "--prefer-binary", "--no-deps", "--require-hashes", "-r", str(lock))


def node_packages(lock: Path, folder: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(lock.with_name(name), folder)
    run(folder, "npm", "ci", "--silent", "--no-audit", "--no-fund")


def run(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
