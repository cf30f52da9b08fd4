"""Real schedulers, workers and inboxes as child processes, with the emulated engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import celery

from perllm.broker.ledger import Ledger, TaskRecord
from perllm.broker.local.process import spawn
from perllm.broker.messages import NodeInfo, Result, TaskSpec, new_id
from perllm.broker.settings import Settings
from support import users
from support.raw import prefix_of, redis_of
from support.wait import PATIENCE, eventually

#: Where the tests' own workers are imported from.
TESTS = Path(__file__).parents[1]
#: Short enough for tests to wait for what lapses, long enough for a busy machine to renew it.
LEASE = 3.0


class Process:
    """One child process. Its output is kept for the tests and shown when it ends unbidden."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self._popen = spawn(command, self._log, environment=environment, folder=folder)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        """What it has written since it was started."""
        with self._log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._offset)
            return log.read()

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self._popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end:\n{self.output}") from None

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()


class Cluster:
    """Processes around one server. Leaving its block ends them all; they also die with the test run. Each runs as the
    user of its role where the server has these (compose/users.acl), else as the one in `url`.

    `settings` are those of every process, as PERLLM_ variables in lower case without the prefix.
    """

    def __init__(self, url: str, folder: Path, **settings: object) -> None:
        usual = {
            "redis_url": url,
            "engine": "emulated",
            "policy": "least-loaded",
            "lease": LEASE,
            "heartbeat": 0.25,
            "leader_ttl": 1.5,
            "snapshot_every": 0.2,
            "grace": 1.0,
        }
        self._folder = folder
        self._url = url
        self._roles = users.known(url)
        self._settings = usual | settings
        self.processes: list[Process] = []
        self.settings = Settings.model_validate(self._settings)
        self.ledger = Ledger(self.settings)

    # --- processes

    def start(self, name: str, *command: str, **settings: object) -> Process:
        """Start a process with these settings on top of the cluster's."""
        variables = {f"PERLLM_{k.upper()}": str(v) for k, v in (self._settings | settings).items()}
        python = [sys.executable, "-W", "ignore", "-m"]  # Celery warns of running as root, as test machines may
        paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths, **variables}
        process = Process(name, [*python, *command], environment, self._folder)
        self.processes.append(process)
        return process

    def url_of(self, role: str) -> str:
        """The server's URL for a role's user."""
        return users.url_of(role, self._url) if self._roles else self._url

    def start_worker(self, app: str, name: str, **settings: object) -> Process:
        quiet = ["--without-gossip", "--without-mingle"]
        user = {"redis_url": self.url_of("inbox" if app == "broker" else "worker")}
        return self.start(
            name,
            "celery",
            "-A",
            app if "." in app else f"perllm.{app}",
            "worker",
            "-n",
            f"{name}@test",
            *quiet,
            **(user | settings),
        )

    def start_node(self, name: str, **settings: object) -> Process:
        return self.start_worker("edge_worker", name, node_name=name, **settings)

    def start_scheduler(self, name: str = "scheduler", **settings: object) -> Process:
        return self.start(name, "perllm.scheduler", **({"redis_url": self.url_of("scheduler")} | settings))

    def start_nodes(self, *names: str, **settings: object) -> list[Process]:
        """Start nodes and wait until they are in service."""
        started = [self.start_node(name, **settings) for name in names]
        for process in started:
            self.await_node(process)
        return started

    def start_inbox(self) -> Process:
        return self.start_worker("broker", "inbox")

    def scheduler(self, name: str = "scheduler", **settings: object) -> Process:
        """Start a scheduler and wait until it leads."""
        process = self.start_scheduler(name, **settings)
        self.watch(process, lambda: self.leads(process), "leads")
        return process

    def await_node(self, process: Process) -> NodeInfo:
        return self.watch(process, lambda: self.node(process.name), "is in service")

    def watch(self, process: Process, look: Callable[[], object], what: str) -> object:
        """Wait for something a process is to do; fails at once, with its output, if it ends instead."""

        def alive_and_seen() -> object:
            seen = look()
            if not seen and not process.running:
                raise AssertionError(f"{process.name} ended:\n{process.output}")
            return seen

        return eventually(alive_and_seen, f"{process.name} {what}")

    def producer(self, role: str = "producer", *, unbound: bool = False) -> celery.Celery:
        """A plain Celery app, which knows nothing of PerLLM; `unbound`: which may use any queue."""
        url = Settings(redis_url=self._url if unbound else self.url_of(role)).celery_url
        return celery.Celery(broker=url, backend=url)

    def start_application(self) -> Process:
        """A producer's own Celery worker (`support.application`)."""
        os.environ["CELERY_BROKER_URL"] = self.producer("application").conf.broker_url
        try:
            return self.start("application", "celery", "-A", "support.application", "worker", "-n", "application@test")
        finally:
            del os.environ["CELERY_BROKER_URL"]

    # --- what the ledger says

    def leads(self, process: Process) -> bool:
        holder = redis_of(self.ledger).get(f"{prefix_of(self.ledger)}leader")
        return holder is not None and f":{process.pid}:" in holder.decode()

    def node(self, name: str) -> NodeInfo | None:
        """The node of this name that is in service and not draining."""
        return next((info for info, _, draining in self.ledger.nodes() if info.name == name and not draining), None)

    def task(self, task_id: str) -> TaskRecord:
        record = self.ledger.task(task_id)
        assert record is not None
        return record

    def submit(self, count: int = 1, **fields: object) -> list[str]:
        """Submit so many tasks of one kind."""
        spec = TaskSpec.model_validate({"prompt": "hello", "max_tokens": 2, "deadline": 600} | fields)
        return self.ledger.submit([(new_id(), spec) for _ in range(count)])

    def result(self, task_id: str) -> Result:
        """The task's result, once it is final."""
        return eventually(lambda: self.ledger.results([task_id])[0], f"task {task_id} is final")

    def in_state(self, task_id: str, *states: str) -> bool:
        return self.task(task_id).state in states

    def await_state(self, task_id: str, *states: str) -> TaskRecord:
        eventually(lambda: self.in_state(task_id, *states), f"task {task_id} is {' or '.join(states)}")
        return self.task(task_id)

    # --- the end

    def stop(self) -> None:
        """Stop everything gracefully, and see that it ends so."""
        for process in self.processes:
            process.signal(signal.SIGTERM)
        for process in self.processes:
            assert process.wait() == 0, f"{process.name}:\n{process.output}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
        self.ledger.close()
