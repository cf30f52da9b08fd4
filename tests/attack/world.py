"""The system under attack, and who watches it: which nodes are there, how much memory each part takes, who ended."""

from __future__ import annotations

import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx
import psutil
from chaos.observer import Observer
from support import users
from support.ports import free_port
from support.raw import prefix_of, redis_of
from support.receivers import NameServer
from support.wait import eventually

from attack import hostile, neighbour, system
from perllm.broker.api.keys import Keys
from perllm.broker.api.store import ApiStore
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Ledger
from perllm.broker.local.process import spawn
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.settings import Settings

ROOT = Path(__file__).parents[2]
#: Where the processes find this tree's modules.
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
EDGES = ("e1", "e2")
#: What an operator gives the two tenants: requests/s, and unfinished tasks. The neighbour's is far more than it uses;
#: the hostile one may not fill the slots of the two nodes by itself, since shares between tenants are not promised.
LIMITS = {"neighbour": (50.0, 100), "hostile": (20.0, 6)}
#: Bytes a part may take beyond what it took with the neighbour alone.
MORE_MEMORY = 512 << 20
_LOOK_EVERY, _WEIGH_EVERY = 0.25, 0.5
_STARTING = 120.0


class Gap(NamedTuple):
    """A node was absent, or its engine stood still, until `at` (s since the epoch), for so long, s."""

    node: str
    at: float
    seconds: float


class World:
    """Leaving its block ends everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir(parents=True)
        self.server = EmbeddedServer(folder / "server", users=users.rules())
        self.server.start()
        self.settings = Settings.model_validate({"redis_url": self.server.url, "data_dir": self.data})
        self.ledger = Ledger(self.settings)
        self.observer = Observer(self.settings)
        self.canary = Canary()
        self.api_port, self.flower_port = free_port(), free_port()
        self.url, self.flower = f"http://127.0.0.1:{self.api_port}", f"http://127.0.0.1:{self.flower_port}"
        keys = Keys(ApiStore(self.settings), self.ledger)
        self.keys = {tenant: keys.make(tenant, "attack", *limits)[1] for tenant, limits in LIMITS.items()}
        self.crashes: list[tuple[float, str]] = []
        self._names = NameServer(_answer)
        self._names.__enter__()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.system = self._up()
        self.watch: Watch | None = None

    def _up(self) -> subprocess.Popen[bytes]:
        own = {
            "PYTHONPATH": PYTHONPATH,
            "PERLLM_REDIS_URL": self.server.url,
            "PERLLM_DATA_DIR": str(self.data),
            "PERLLM_WEBHOOK_ALLOW": f'["{neighbour.HERE}/32", "{hostile.HERE}/32"]',
            "PERLLM_WEBHOOK_DNS": f'["{self._names.address}"]',
        }
        command = ["attack.system", "up", "--edges", str(len(EDGES))]
        command += ["--api-port", str(self.api_port), "--flower-port", str(self.flower_port)]
        return self.spawn("system", command, own)

    def spawn(self, name: str, command: Sequence[str], own: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a Python module as a process."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PERLLM_")}
        environment |= {"PYTHONPATH": PYTHONPATH} | (own or {})
        python = [sys.executable, "-W", "ignore", "-m"]
        process = spawn([*python, *command], self.folder / f"{name}.log", environment=environment)
        self._processes.append(process)
        return process

    def await_ready(self) -> None:
        """Wait until everything is up."""

        def ready() -> bool:
            assert self.system.poll() is None, self.log("system")
            try:
                there = {info.name for info, _, _ in self.ledger.nodes()} == set(EDGES)
                return there and httpx.get(f"{self.url}/ready").status_code == 200
            except (httpx.HTTPError, Unreachable):
                return False

        eventually(ready, "the system is up", _STARTING)

    def tend(self) -> None:
        """Start the system again where its supervisor has ended, and remember that it did."""
        if (status := self.system.poll()) is not None:
            last = " / ".join(self.log("system").splitlines()[-3:])
            self.crashes.append((time.time(), f"the supervisor ended with status {status}: {last}"))
            self.system = self._up()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def parts(self) -> dict[str, psutil.Process]:
        """The supervisor, its parts that are there, and the server."""
        found = {}
        commands = {tuple(command): name for name, command in system.parts(self.data).items()}
        try:
            found["supervisor"] = psutil.Process(self.system.pid)
            if self.server.pid is not None:
                found["server"] = psutil.Process(self.server.pid)
            for child in found["supervisor"].children():
                if name := commands.get(tuple(child.cmdline())):
                    found[name] = child
        except psutil.Error:
            pass
        return found

    def overdue(self) -> int:
        """Tasks that should have ended long ago."""
        now = self.ledger.now()
        unfinished = [s for s in self.ledger.counts() if not s.final]
        pipe = redis_of(self.ledger).pipeline(transaction=False)
        for task_id in [i for state in unfinished for i in self.ledger.ids(state, limit=2000)]:
            pipe.hmget(f"{prefix_of(self.ledger)}task:{task_id}", "deadline", "result")
        return sum(1 for deadline, result in pipe.execute() if deadline and not result and now - float(deadline) > 10)

    def unreadable(self) -> list[str]:
        """Tasks whose record cannot be read back, and why."""
        found = []
        for state in self.ledger.counts():
            for task_id in self.ledger.ids(state, limit=2000, newest=True):
                try:
                    self.ledger.task(task_id)
                except ValueError as error:
                    found.append(f"{task_id}, {state}: {' '.join(str(error).split())[:200]}")
        return found

    def stop_system(self) -> int:
        """Stop it as Ctrl-C does; its exit status."""
        self.system.send_signal(signal.SIGTERM)
        try:
            return self.system.wait(timeout=60)
        except subprocess.TimeoutExpired:
            return -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.watch is not None:
            self.watch.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.canary.close()
        self._names.__exit__(None, None, None)
        self.observer.close()
        self.ledger.close()
        self.server.kill()


class Watch:
    """A thread that looks at a world again and again. `seen` and `peaks` begin anew with `phase`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ledger = Ledger(world.settings)
        self.gaps: list[Gap] = []
        self.peaks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))  # phase → part → bytes
        self.phase = "start"
        self._last_seen: dict[str, float] = {}
        self._still: dict[str, float] = {}
        self._pids: dict[str, int] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = 0.0
        while not self._closed.wait(_LOOK_EVERY):
            self._look()
            if time.monotonic() >= due:
                due = time.monotonic() + _WEIGH_EVERY
                self._weigh()

    def _look(self) -> None:
        now = time.time()
        try:
            rows = self._ledger.nodes()
        except Unreachable:
            rows = []
        here = {info.name for info, _, draining in rows if not draining}
        for name in here:
            if (since := self._last_seen.get(name)) is not None and now - since > 4 * _LOOK_EVERY:
                self.gaps.append(Gap(name, now, now - since))
            self._last_seen[name] = now
        for info, beat, _ in rows:
            still = beat.counters.since_progress if beat else 0.0
            if still < (before := self._still.get(info.name, 0.0)) and before > 1.0:
                self.gaps.append(Gap(f"{info.name}'s engine", now, before))
            self._still[info.name] = still

    def _weigh(self) -> None:
        for name, process in self._world.parts().items():
            if self._pids.get(name, process.pid) != process.pid and name != "supervisor":
                path = self._world.data / "logs" / f"{name}.log"
                said = path.read_text(errors="replace").splitlines() if path.exists() else []
                words = [x for x in said[-20:] if "rror" in x or "atal" in x or "egment" in x][-2:]
                self._world.crashes.append((time.time(), f"{name} ended and was started again: {' / '.join(words)}"))
            self._pids[name] = process.pid
            if self.phase:
                peaks = self.peaks[self.phase]
                peaks[name] = max(peaks[name], _bytes(process, whole=name != "supervisor"))

    def close(self) -> None:
        """Stop, and count as gaps what is still away."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        now = time.time()
        self.gaps += [Gap(n, now, now - at) for n, at in self._last_seen.items() if now - at > 4 * _LOOK_EVERY]
        self.gaps += [Gap(f"{n}'s engine", now, s) for n, s in self._still.items() if s > 1.0]
        self._ledger.close()


def _bytes(process: psutil.Process, *, whole: bool) -> int:
    """Memory of a process, and of its children where `whole`; what they share counts once."""
    total = 0
    try:
        family = [process, *(process.children(recursive=True) if whole else ())]
    except psutil.Error:
        return 0
    for one in family:
        try:
            total += one.memory_full_info().pss
        except (psutil.Error, AttributeError):
            continue
    return total


class Canary:
    """A server on a private address. `visits` are the first lines of what came: nothing may."""

    def __init__(self) -> None:
        self.visits: list[str] = []
        visits = self.visits

        class Visit(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(5)
                visits.append(self.rfile.readline(200).decode("latin-1").strip())

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Visit)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


_asked = count()


def _answer(name: str, kind: str) -> list[str] | None:
    """A name server that says nothing of names below `.silent.test`, and changes its mind of those below
    `.rebind.test`: 127.0.0.3, which webhooks may reach, and 127.0.0.1 in turn."""
    if name.endswith(".silent.test"):
        return None
    if name.endswith(".rebind.test") and kind == "A":
        return [("127.0.0.3", "127.0.0.1")[next(_asked) % 2]]
    return []
