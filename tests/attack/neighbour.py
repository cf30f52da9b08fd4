"""The neighbour: `python -m attack.neighbour URL KEY FILE`, until SIGTERM; then it finishes what it has begun.

A short chat completion now and then, a look at what is there, a small batch, and a webhook that is told of all its
tasks. Each is begun when it is due, however long those before it take. What became of each is a line of JSON in the
file.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

#: Where its webhook is received: the system is told that it may post there.
HERE = "127.0.0.2"
#: What it does: s between two of them, and s each may take to be on time.
EVERY = {"chat": 0.7, "get": 1.1, "batch": 12.0}
ALLOWED = {"chat": 5.0, "get": 2.0, "batch": 30.0}
#: Seconds after its end within which a task is told of to the webhook.
TOLD_WITHIN = 10.0
_BATCH_LINES = 3
_PATIENCE = 45.0


class Neighbour:
    """See the module's head."""

    def __init__(self, url: str, key: str, file: Path) -> None:
        limits = httpx.Limits(max_connections=100)
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=_PATIENCE, limits=limits)
        self._file = file.open("a", buffering=1)
        self._random = random.Random(1)
        self._stopping = asyncio.Event()
        self._last = ""
        self._untold: set[str] = set()  # tasks and batches that have ended
        self._told_of: set[str] = set()

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopping.set)
        sink = await asyncio.start_server(self._receive, HERE, 0)
        port = sink.sockets[0].getsockname()[1]
        hook = {"url": f"http://{HERE}:{port}/hook", "events": ["task.succeeded", "batch.completed"]}
        (await self._http.post("/v1/webhooks", json=hook)).raise_for_status()
        self._note(op="ready")
        doing: dict[str, Callable[[], Awaitable[str]]] = {"chat": self._chat, "get": self._get, "batch": self._batch}
        await asyncio.gather(*(self._repeat(op, EVERY[op], do) for op, do in doing.items()))
        give_up = time.monotonic() + TOLD_WITHIN
        while self._untold and time.monotonic() < give_up:
            await asyncio.sleep(0.1)
        sink.close()

    async def _repeat(self, op: str, every: float, do: Callable[[], Awaitable[str]]) -> None:
        begun: set[asyncio.Task[None]] = set()
        while not self._stopping.is_set():
            begun.add(asyncio.create_task(self._one(op, do)))
            await asyncio.wait({asyncio.create_task(self._stopping.wait())}, timeout=every)
        await asyncio.gather(*begun)

    async def _one(self, op: str, do: Callable[[], Awaitable[str]]) -> None:
        at, began = time.time(), time.monotonic()
        try:
            identity, failure = await do(), None
            self._untold |= {identity} - self._told_of - {""}
        except httpx.HTTPStatusError as error:
            identity, failure = "", f"{error.response.status_code} {error.response.text[:300]}"
        except (httpx.HTTPError, TimeoutError) as error:
            identity, failure = "", f"{type(error).__name__} {error}"
        took = time.monotonic() - began
        self._note(op=op, at=at, took=round(took, 3), failure=failure, id=identity)

    async def _ask(self, method: str, path: str, **more: Any) -> Any:
        answer = await self._http.request(method, path, **more)
        answer.raise_for_status()
        return answer.json()

    async def _chat(self) -> str:
        colour = self._random.choice(("blue", "red", "green"))
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": f"Name something {colour}."}],
            "max_tokens": self._random.randint(2, 8),
            "deadline": ALLOWED["chat"],
        }
        self._last = (await self._ask("POST", "/v1/chat/completions", json=body))["id"]
        return self._last

    async def _get(self) -> str:
        await self._ask("GET", f"/v1/tasks/{self._last}" if self._last else "/v1/tasks")
        return ""

    async def _batch(self) -> str:
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 3}
        lines = [json.dumps({"custom_id": f"{n}", "body": body}) for n in range(_BATCH_LINES)]
        file = ("lines.jsonl", "\n".join(lines).encode())
        made = await self._ask("POST", "/v1/files", data={"purpose": "batch"}, files={"file": file})
        window = f"{ALLOWED['batch']:.0f}s"
        wanted = {"input_file_id": made["id"], "endpoint": "/v1/chat/completions", "completion_window": window}
        batch = await self._ask("POST", "/v1/batches", json=wanted)
        give_up = time.monotonic() + _PATIENCE
        while batch["status"] in ("validating", "in_progress", "finalizing"):
            if time.monotonic() > give_up:
                raise TimeoutError(f"batch {batch['id']} is {batch['status']}")
            await asyncio.sleep(0.5)
            batch = await self._ask("GET", f"/v1/batches/{batch['id']}")
        if batch["request_counts"]["completed"] != _BATCH_LINES:
            raise TimeoutError(f"batch {batch['id']}: {batch['status']} {batch['request_counts']}")
        return str(batch["id"])

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = next(line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        told = json.loads(await reader.readexactly(int(length)))
        identity = told["data"]["id"]
        self._note(op="told", at=time.time(), id=identity)
        self._told_of.add(identity)
        self._untold.discard(identity)
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    def _note(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """What it has noted so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    asyncio.run(Neighbour(sys.argv[1], sys.argv[2], Path(sys.argv[3])).run())
