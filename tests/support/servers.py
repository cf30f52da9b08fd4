"""The Redis-compatible servers the tests run against, as real processes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redis

from perllm.broker.local.process import spawn
from perllm.broker.local.server import EmbeddedServer
from support.wait import eventually


class DebianRedis:
    """A `redis-server` from PATH on a Unix socket (or whatever `options` say), without persistence."""

    def __init__(self, data_dir: Path, options: Sequence[str] = (), url: str | None = None) -> None:
        socket = data_dir / "redis.sock"
        self.url = url or f"unix://{socket}"
        listen = ["--port", "0", "--unixsocket", str(socket)] if url is None else []
        self._command = ["redis-server", "--dir", str(data_dir), "--save", "", *listen, *options]
        self._log = data_dir / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def version() -> tuple[int, ...] | None:
        """Version of the redis-server on PATH, None without one."""
        if shutil.which("redis-server") is None:
            return None
        words = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout.split()
        return tuple(int(n) for n in next(w for w in words if w.startswith("v="))[2:].split("."))

    def start(self) -> None:
        process = self._process = spawn(self._command, self._log)

        def answers() -> bool:
            assert process.poll() is None, self._log.read_text()
            return ping(self.url)

        eventually(answers, "redis-server answers")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


Server = EmbeddedServer | DebianRedis


def ping(url: str) -> bool:
    client = redis.Redis.from_url(url)
    try:
        return bool(client.ping())
    except redis.exceptions.RedisError:
        return False
    finally:
        client.close()


def skip_without_debian_redis() -> None:
    """Skip the test, by name, where there is no usable redis-server."""
    version = DebianRedis.version()
    if version is None or version < (7, 0):
        pytest.skip("no redis-server >= 7.0 on PATH")
