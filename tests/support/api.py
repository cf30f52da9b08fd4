"""A running system with the HTTP API in front, and clients for it."""

from __future__ import annotations

import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from openai import OpenAI

from perllm.broker.api.keys import Keys
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.ledger import Ledger
from perllm.broker.local.process import spawn
from support.ports import free_port
from support.wait import eventually


class ApiProcess:
    """`perllm api` as a process, and with `webhooks`, a Redis URL, the worker that delivers them. `settings` are
    PERLLM_ variables in lower case without the prefix."""

    def __init__(self, url: str, folder: Path, *, webhooks: str | None = None, **settings: object) -> None:
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"api-{self.port}.log"
        given: dict[str, object] = {"redis_url": url, "data_dir": folder, "api_port": self.port, **settings}
        variables = {f"PERLLM_{k.upper()}": str(v) for k, v in given.items()}
        self.settings = ApiSettings.model_validate({"redis_url": url, "data_dir": folder})
        self.ledger = Ledger(self.settings)
        self.store = ApiStore(self.settings)
        self.keys = Keys(self.store, self.ledger)
        environment = {**os.environ, **variables}
        self.process = spawn([sys.executable, "-m", "perllm.broker.api"], self.log, environment=environment)
        deliverer = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "celery",
            "-A",
            "perllm.broker.api",
            "worker",
            "-n",
            "hooks@test",
        ]
        self.deliverer = None
        if webhooks:
            command = [*deliverer, "--without-gossip", "--without-mingle"]
            own = {**environment, "PERLLM_REDIS_URL": webhooks}
            self.deliverer = spawn(command, folder / "webhooks.log", environment=own)

    def await_health(self) -> None:
        def healthy() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.get(f"{self.base}/health").status_code == 200
            except httpx.TransportError:
                return False

        eventually(healthy, "the API answers")

    def key(
        self,
        tenant: str = "default",
        rate: float | None = None,
        in_flight: int | None = None,
        max_value: float = 1.0,
        *,
        operator: bool = False,
    ) -> str:
        return self.keys.make(tenant, "test", rate, in_flight, max_value, operator=operator)[1]

    def openai(self, tenant: str = "default", **options: Any) -> OpenAI:
        """The official client, with a key of this tenant's."""
        options = {"api_key": self.key(tenant), "max_retries": 0, "timeout": 60, **options}
        return OpenAI(base_url=f"{self.base}/v1", **options)

    def http(self, tenant: str = "default", *, operator: bool = False) -> httpx.Client:
        """A plain client, with a key of this tenant's."""
        key = self.key(tenant, operator=operator)
        return httpx.Client(base_url=self.base, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def __enter__(self) -> Self:
        self.await_health()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (self.process, self.deliverer):
            if process is not None:
                process.terminate()
        for process in (self.process, self.deliverer):
            if process is not None:
                process.wait()
        self.ledger.close()
        self.store.close()


class Sink:
    """A webhook receiver. `statuses` are answered in turn, the last one for good."""

    def __init__(self, host: str, *statuses: int) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        left = list(statuses)
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
