"""The embedded server, with power cuts: it can be ended as if nothing it had not synced had reached the disk."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from support.replicated import Replicated

from chaos.history import Fsync, Outage
from perllm.broker.local.server import EmbeddedServer

#: Seconds of writes a power cut may take under `everysec`.
_UNSYNCED = 1.0
_SAMPLE_EVERY = 0.02


class FragileServer:
    """A server with its append-only file, whose life ends and begins again. `users`: see `EmbeddedServer`."""

    def __init__(self, folder: Path, users: Sequence[str] = ()) -> None:
        self.outages: list[Outage] = []
        self.fsync: Fsync = "everysec"
        self._folder, self._users = folder, users
        self._server = EmbeddedServer(folder, fsync=self.fsync, users=users)
        self._server.start()
        self.url = self._server.url
        self._sizes: deque[tuple[float, Path, int]] = deque()  # of the file being written, lately
        self._watched = threading.Event()
        threading.Thread(target=self._watch, name="append-only-file", daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._server.pid is not None
        return self._server.pid

    def start(self, fsync: Fsync) -> None:
        """Start again on what is on the disk; returns when it answers."""
        self.fsync = fsync
        self._sizes.clear()
        self._server = EmbeddedServer(self._folder, fsync=fsync, users=self._users)
        self._server.start()

    def kill(self) -> None:
        """SIGKILL: what it wrote is on the disk, synced or not."""
        self.outages.append(Outage(time.time(), self.fsync))
        self._server.kill()

    def power_cut(self, share: float) -> None:
        """SIGKILL, and of what was written in the last second that share is lost, at any byte. Under `always` nothing
        that was answered is unsynced, so nothing is."""
        since = time.monotonic() - _UNSYNCED
        self.kill()
        if self.fsync == "always":
            return
        path = _newest(self._folder)
        samples = [(at, size) for at, sampled, size in list(self._sizes) if sampled == path]
        if path is not None and samples:
            size = path.stat().st_size
            synced = max((then for at, then in samples if at <= since), default=samples[0][1])
            synced = min(size, synced)  # a server that starts cuts off what it cannot read: the file was longer then
            os.truncate(path, size - int((size - synced) * share))

    def stop(self) -> None:
        self._server.stop()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self._watched.set()
        self._server.kill()

    def _watch(self) -> None:
        while not self._watched.wait(_SAMPLE_EVERY):
            with suppress(FileNotFoundError):  # it may just have been rewritten
                if (path := _newest(self._folder)) is not None:
                    self._sizes.append((time.monotonic(), path, path.stat().st_size))
            while len(self._sizes) > 3 * _UNSYNCED / _SAMPLE_EVERY:
                self._sizes.popleft()


class MovingServer:
    """The same for a primary with a replica, which takes its place. Every blow kills the primary."""

    def __init__(self, folder: Path, users: Sequence[str] = (), *, waits: bool) -> None:
        self.outages: list[Outage] = []
        self._fsync: Fsync = "replica" if waits else "everysec"
        self._dead: int | None = None
        self._servers = Replicated(folder, users)
        self._servers.start()
        self.url = self._servers.url

    def answers(self) -> bool:
        """Whether there is a primary that was not killed."""
        return self._servers.primary not in (None, self._dead)

    def revive(self) -> None:
        """Let the one that was killed follow the new primary; returns when it does."""
        assert self._dead is not None
        self._servers.revive(self._dead)

    def kill(self) -> None:
        self.outages.append(Outage(time.time(), self._fsync))
        self._dead = self._servers.kill()

    def close(self) -> None:
        self._servers.close()


def _newest(folder: Path) -> Path | None:
    """The append-only file that is being written."""
    found = folder.glob("appendonlydir/*.incr.aof")
    return max(found, key=lambda p: int(p.name.split(".")[-3]), default=None)
