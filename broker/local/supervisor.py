"""The whole system on one machine, as child processes: server, scheduler, inbox, edge and cloud workers, Flower.

Used by `perllm up` and `perllm demo`. Every child dies with its parent, however the parent ends. A child that ends is
started again, for ever, after pauses that grow while it does not live.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from perllm.broker.api.settings import ApiSettings
from perllm.broker.connection import NEAR_REPLY_TIMEOUT, check
from perllm.broker.engine.cores import available_cores
from perllm.broker.errors import BadSetting, Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.local.process import keep_small, spawn
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.logs import LAST_WORDS
from perllm.broker.private_files import own_folder
from perllm.broker.settings import Settings, environment, load_settings
from perllm.broker.worker.settings import WorkerSettings

#: Seconds the slowest part may take to appear: an engine that loads, requantises and calibrates its model, a scheduler
#: that compiles its policy for the first time.
START_TIMEOUT = 300.0
#: A part that lived so long, s, had come to work: it is started again at once. Else first after `PAUSE`, then after
#: twice as long each time, up to `LONGEST_PAUSE`.
STEADY = 10.0
PAUSE, LONGEST_PAUSE = 0.5, 30.0
#: The exit status of a part whose settings are wrong: it has said so in one line.
WRONG_SETTING = 2
#: How much of the end of a log is looked at for a part's last words, bytes.
_TAIL = 16_384

log = structlog.get_logger(__name__)


def pause(failures: int) -> float:
    """Seconds before a part is started again that has ended `failures` times in a row without having lived."""
    if failures == 0:
        return 0.0
    return min(LONGEST_PAUSE, PAUSE * 2.0 ** min(failures - 1, 30)) * random.uniform(0.75, 1.0)


@dataclass(slots=True)
class _Restarts:
    """When a part that has ended is started again."""

    started: float = field(default_factory=time.monotonic)
    failures: int = 0
    due: float | None = None  # None: it runs, as far as is known

    def note_end(self) -> float:
        """It has ended. Returns the pause, s."""
        now = time.monotonic()
        self.failures = 0 if now - self.started >= STEADY else self.failures + 1
        wait = pause(self.failures)
        self.due = now + wait
        return wait

    def note_start(self) -> None:
        """It is started now."""
        self.started, self.due = time.monotonic(), None


def last_words(line: str) -> str | None:
    """What a process that could not start said of it, if this is the line (`perllm.broker.errors.exit_with`)."""
    if f'"{LAST_WORDS}"' in line:
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(line)["reason"])
    return line.removeprefix("error: ") if line.startswith("error: ") else None


@dataclass(slots=True)
class _Child:
    """One process: how it was started, and where its output goes."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log_path: Path
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    said: int = 0  # bytes of its log before it was started

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Raises OSError."""
        self.process = None
        self.said = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.process = spawn(self.command, self.log_path, environment=self.environment, folder=self.folder)

    def end(self) -> str:
        """How it ended, for people."""
        status = None if self.process is None else self.process.returncode
        if status is None:
            return "did not start"
        return f"signal {-status}" if status < 0 else f"status {status}: {self.last_words()}"

    def last_words(self) -> str:
        try:
            size = self.log_path.stat().st_size
            with self.log_path.open("rb") as said:
                said.seek(max(size - _TAIL, self.said if self.said <= size else 0))
                lines = [x for x in said.read(_TAIL).decode(errors="replace").splitlines() if x.strip()]
        except OSError as error:
            return f"its log cannot be read: {error.strerror}"
        words = next((text for x in reversed(lines) if (text := last_words(x))), lines[-1] if lines else "nothing")
        return words[:500]


@dataclass
class Supervisor:
    """Start it with `with Supervisor(...) as stack`; leaving the block stops everything, workers first.

    `edges` and `clouds` name the nodes. `flower_port` None: no Flower; `api_port` None: no HTTP API (it is open to this
    machine's users, as the tenant "default", without a key). With PERLLM_REDIS_URL set, that server is used
    and none is embedded.
    """

    settings: Settings
    edges: tuple[str, ...] = ("one", "two")
    clouds: tuple[str, ...] = ("gpu",)
    flower_port: int | None = None
    api_port: int | None = None
    server_port: int | None = None
    node_environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    _node: WorkerSettings = field(default_factory=lambda: load_settings(WorkerSettings))
    _server: EmbeddedServer | None = None
    _children: list[_Child] = field(default_factory=list)
    _restarts: dict[str, _Restarts] = field(default_factory=dict)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The Redis URL in use, secrets included."""
        return self._server.url if self._server else self.settings.url

    @property
    def logs(self) -> Path:
        """The folder of the children's logs."""
        return self.settings.data_dir / "logs"

    def _start(self) -> None:
        if self.flower_port is not None:
            _check_free(self.flower_port, "--flower-port")
        if self.api_port is not None:
            _check_free(self.api_port, "--api-port")
        if self.settings.redis_url is None:
            self._server = EmbeddedServer(self.settings.data_dir, self.server_port, memory=self.settings.server_memory)
            self._server.start()
            self._restarts["server"] = _Restarts()
        given = {"redis_url": self.url, "data_dir": self.settings.data_dir}
        self.settings = load_settings(**given)
        api_settings = load_settings(ApiSettings, **given)
        check(self.settings)
        self._make_folders()
        celery = [sys.executable, "-m", "celery", "-A"]
        quiet = ["--without-gossip", "--without-mingle"]
        self._launch("scheduler", [sys.executable, "-m", "perllm.scheduler"])
        self._launch("inbox", [*celery, "perllm.broker", "worker", "-n", "inbox@perllm", *quiet])
        edge_threads, cloud_threads = share_cores(available_cores(), len(self.edges), len(self.clouds))
        for tier, names, threads in (("edge", self.edges, edge_threads), ("cloud", self.clouds, cloud_threads)):
            for name in names:
                command = [*celery, f"perllm.{tier}_worker", "worker", "-n", f"{tier}.{name}@perllm", *quiet]
                own = {"PERLLM_NODE_NAME": name, "PERLLM_THREADS": str(self._node.threads or threads)}
                self._launch(f"{tier}.{name}", command, **own, **self.node_environment.get(name, {}))
        if self.api_port is not None:
            here = {"PERLLM_API_HOST": "127.0.0.1", "PERLLM_API_PORT": str(self.api_port), "PERLLM_API_OPEN": "true"}
            here = {**api_settings.environment(), **here}
            self._launch("api", [sys.executable, "-m", "perllm.broker.api"], **here)
            self._launch("webhooks", [*celery, "perllm.broker.api", "worker", "-n", "webhooks@perllm", *quiet], **here)
        if self.flower_port is not None:
            where = ["--address=127.0.0.1", f"--port={self.flower_port}"]
            self._launch(
                "flower",
                [sys.executable, "-m", "perllm.broker.local.flower", *where],
                FLOWER_UNAUTHENTICATED_API="true",
            )

    def _make_folders(self) -> None:
        folder = self.settings.data_dir
        try:
            for own in (folder, self.logs, folder / "run"):
                own_folder(own, "PERLLM_DATA_DIR")
        except OSError as error:
            raise BadSetting(
                f"the data folder {folder} cannot be used ({error.strerror}): set PERLLM_DATA_DIR"
            ) from None

    def _launch(self, name: str, command: list[str], **own_settings: str) -> None:
        path = self.logs / f"{name}.log"
        path.unlink(missing_ok=True)
        # What lies in the folder the user happens to be in is not imported: Celery puts the working directory first,
        # which therefore is a folder of ours.
        paths = os.environ.get("PYTHONPATH")
        own = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))} if paths else {}
        own |= {"PYTHONSAFEPATH": "1", **environment(self.settings), **own_settings}
        child = _Child(name, command, {**os.environ, **own}, path, self.settings.data_dir / "run")
        self._children.append(child)
        self._restarts[name] = _Restarts()
        child.start()

    def waiting_for(self) -> set[str]:
        """Names of nodes that have not registered yet, "scheduler" while none leads, "api" while it does not listen.
        Raises BadSetting when a part has ended because of a wrong setting: its last words."""
        for child in self._children:
            if not child.running and child.process is not None and child.process.returncode == WRONG_SETTING:
                raise BadSetting(f"{child.name} did not start: {child.last_words()} (log: {child.log_path})")
        ledger = Ledger(self.settings, reply_timeout=NEAR_REPLY_TIMEOUT)
        try:
            present = {info.name for info, _, _ in ledger.nodes()}
            if ledger.led():
                present.add("scheduler")
        except Unreachable:
            present = set()
        finally:
            ledger.close()
        if self.api_port is not None and _listens(self.api_port):
            present.add("api")
        expected = {*self.edges, *self.clouds, "scheduler"}
        return (expected if self.api_port is None else {*expected, "api"}) - present

    def tend(self) -> Iterator[str]:
        """Start again what has ended and whose pause is over, and keep logs small. Yields a line for people for
        whatever happened; raises nothing on account of a part."""
        if self._server is not None:
            yield from self._tend("server", self._server.running, self._server_end, self._server.start)
            keep_small(self._server.log)
        for child in self._children:
            yield from self._tend(child.name, child.running, child.end, child.start)
            keep_small(child.log_path)

    def _tend(self, name: str, running: bool, end: Callable[[], str], start: Callable[[], None]) -> Iterator[str]:
        restarts = self._restarts[name]
        if running:
            return
        if restarts.due is None:
            wait = restarts.note_end()
            yield f"{name} ended ({end()}); started again {f'in {wait:.1f} s' if wait else 'at once'}"
        if restarts.due is not None and time.monotonic() >= restarts.due:
            restarts.note_start()
            try:
                start()
            except (OSError, BadSetting) as error:
                wait = restarts.note_end()
                yield f"{name} could not be started ({error}); again in {wait:.1f} s"

    def _server_end(self) -> str:
        assert self._server is not None
        return f"see {self._server.log}"

    def stop(self) -> None:
        """Stop everything: workers hand back and leave, then the scheduler, the server last. Idempotent."""
        patience = self._node.grace + self.settings.lease + 10.0
        for children in (self._children[2:], self._children[:2]):
            for child in children:
                if child.process is not None and child.process.poll() is None:
                    child.process.terminate()
            for child in children:
                _reap(child, patience)
        self._children.clear()
        if self._server is not None:
            self._server.stop()
            self._server = None


def share_cores(cores: int, edges: int, clouds: int) -> tuple[int, int]:
    """Threads for each edge and each cloud engine, a cloud one weighing as two: llama.cpp's threads spin, so together
    they do not exceed the cores unless there are more engines than cores."""
    each = max(1, cores // max(1, edges + 2 * clouds))
    return each, max(1, (cores - edges * each) // max(1, clouds))


def _reap(child: _Child, patience: float) -> None:
    if child.process is None:
        return
    try:
        child.process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        log.warning("killed", name=child.name)
        child.process.kill()
        child.process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise BadSetting(f"port {port} is in use by another program: choose another with {option}") from None
