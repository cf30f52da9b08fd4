"""The whole system on one machine, as child processes: server, scheduler, inbox, edge and cloud workers, Flower.

Used by `perllm up` and `perllm demo`. Every child dies with its parent, however the parent ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from perllm.broker.connection import check
from perllm.broker.engine.cores import available_cores
from perllm.broker.errors import BadSetting
from perllm.broker.ledger import Ledger
from perllm.broker.local.process import spawn
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.settings import Settings, load_settings

#: Seconds the slowest part (an engine that loads, requantises and calibrates its model) may take to appear.
START_TIMEOUT = 180.0
#: A child that ends sooner than this after its start is not worth restarting.
_TOO_SOON = 10.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Child:
    """One process: how it was started, and where its output goes."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def start(self) -> None:
        self.process = spawn(self.command, self.log_path, environment=self.environment)
        self.started = time.monotonic()

    def last_words(self) -> str:
        lines = [x for x in self.log_path.read_text(errors="replace").splitlines() if x.strip()]
        said = next((x for x in reversed(lines) if x.startswith("error: ")), lines[-1] if lines else "nothing")
        return said.removeprefix("error: ")


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
    _server: EmbeddedServer | None = None
    _children: list[_Child] = field(default_factory=list)

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
            self._server = EmbeddedServer(self.settings.data_dir, self.server_port)
            self._server.start()
        self.settings = load_settings(redis_url=self.url, data_dir=self.settings.data_dir)
        check(self.settings)
        self.logs.mkdir(parents=True, exist_ok=True)
        celery = [sys.executable, "-m", "celery", "-A"]
        quiet = ["--without-gossip", "--without-mingle"]
        self._launch("scheduler", [sys.executable, "-m", "perllm.scheduler"])
        self._launch("inbox", [*celery, "perllm.broker", "worker", "-n", "inbox@perllm", *quiet])
        edge_threads, cloud_threads = share_cores(available_cores(), len(self.edges), len(self.clouds))
        for tier, names, threads in (("edge", self.edges, edge_threads), ("cloud", self.clouds, cloud_threads)):
            for name in names:
                command = [*celery, f"perllm.{tier}_worker", "worker", "-n", f"{tier}.{name}@perllm", *quiet]
                own = {"PERLLM_NODE_NAME": name, "PERLLM_THREADS": str(self.settings.threads or threads)}
                self._launch(f"{tier}.{name}", command, **own, **self.node_environment.get(name, {}))
        if self.api_port is not None:
            here = {"PERLLM_API_HOST": "127.0.0.1", "PERLLM_API_PORT": str(self.api_port), "PERLLM_API_OPEN": "true"}
            self._launch("api", [sys.executable, "-m", "perllm.broker.api"], **here)
            self._launch("webhooks", [*celery, "perllm.broker.api", "worker", "-n", "webhooks@perllm", *quiet])
        if self.flower_port is not None:
            where = ["--address=127.0.0.1", f"--port={self.flower_port}"]
            self._launch("flower", [*celery, "broker", "flower", *where], FLOWER_UNAUTHENTICATED_API="true")

    def _launch(self, name: str, command: list[str], **environment: str) -> None:
        own = {"PERLLM_REDIS_URL": self.url, "PERLLM_DATA_DIR": str(self.settings.data_dir), **environment}
        path = self.logs / f"{name}.log"
        path.unlink(missing_ok=True)
        child = _Child(name, command, {**os.environ, **own}, path)
        child.start()
        self._children.append(child)

    def waiting_for(self) -> set[str]:
        """Names of nodes that have not registered yet. Raises BadSetting when a part has died: its last words."""
        for child in self._children:
            assert child.process is not None
            if child.process.poll() is not None:
                raise BadSetting(f"{child.name} did not start: {child.last_words()} (log: {child.log_path})")
        ledger = Ledger(self.settings)
        present = {info.name for info, _, _ in ledger.nodes()}
        ledger.client.close()
        return {*self.edges, *self.clouds} - present

    def revive(self) -> list[str]:
        """Restart children that have died since; returns their names. Raises BadSetting for one that keeps dying."""
        revived = []
        for child in self._children:
            assert child.process is not None
            if child.process.poll() is None:
                continue
            if time.monotonic() - child.started < _TOO_SOON:
                raise BadSetting(f"{child.name} keeps ending: {child.last_words()} (log: {child.log_path})")
            child.start()
            revived.append(child.name)
        return revived

    def stop(self) -> None:
        """Stop everything: workers hand back and leave, then the scheduler, the server last. Idempotent."""
        patience = self.settings.grace + self.settings.lease + 5.0
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


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise BadSetting(f"port {port} is in use by another program: choose another with {option}") from None
