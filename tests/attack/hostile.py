"""The hostile tenant, for as long as its `Plan` says.

Every attack is one of a kind (`attack.kinds`) and has a number; seed, kind and number decide what it does. What it asks
and how it is answered goes to a file, a line of JSON each.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

#: Attacks at a time.
_AT_ONCE = 14
#: Requests/s with its key: what the key is good for, so that most are looked at. How often a task that is refused
#: because there are too many is handed in again.
_RATE, _AGAIN = 18.0, 6
#: Seconds one request, and one attack, may take.
_PATIENCE, _LONGEST = 25.0, 60.0
#: Most bytes of files it stores in all: where there is no quota, the disk is not to be filled.
MOST_STORED = 1 << 30
#: Where its servers are: the system is told that it may post there.
HERE = "127.0.0.3"
#: An address on which nothing listens.
CLOSED = f"http://{HERE}:9/"


@dataclass(frozen=True)
class Plan:
    """What a hostile process is told."""

    url: str
    key: str
    flower: str
    inbox: str  # Redis URL of the user `producer`
    canary: str  # URL of a server on a private address, which nobody may reach through a webhook
    file: str
    seed: int
    seconds: float
    only: Sequence[str] = ()  # kinds; else all


Attack = Callable[["Hostile", random.Random], Awaitable[None]]


class Hostile:
    """What the attacks have at hand. `kind` and `number` are those of the attack under way in this task."""

    def __init__(self, plan: Plan, kind: str = "start", number: int = 0, shared: Hostile | None = None) -> None:
        self.plan, self.kind, self.number = plan, kind, number
        if shared is None:
            limits = httpx.Limits(max_connections=2000, max_keepalive_connections=50)
            no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # else loading the authorities takes long
            self.http = httpx.AsyncClient(base_url=plan.url, timeout=_PATIENCE, limits=limits, verify=no_tls)
            self._file = Path(plan.file).open("a", buffering=1)  # noqa: SIM115  open to the end
            self.servers: dict[str, str] = {}  # URLs of its webhook receivers, by how they behave
            self.stored = [0]  # bytes of files
            self._pace = [0.0]  # when the next request is due
        else:
            self.http, self._file = shared.http, shared._file
            self.servers, self.stored = shared.servers, shared.stored
            self._pace = shared._pace

    def note(self, **line: Any) -> None:
        self._file.write(json.dumps({"kind": self.kind, "number": self.number, "at": time.time(), **line}) + "\n")

    async def ask(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, key: str | None = "", **more: Any
    ) -> httpx.Response | None:
        """One request: `body` as JSON (whatever is in it), or `raw` bytes. `key` "" is its own, None none. None where
        there was no answer."""
        headers = {
            **({} if key is None else {"Authorization": f"Bearer {key or self.plan.key}"}),
            **more.pop("headers", {}),
        }
        if body is not None:
            raw = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        if key == "":
            self._pace[0] = due = max(self._pace[0] + 1 / _RATE, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
        began = time.monotonic()
        answer = None
        said = "cut"  # by the end of the attack
        try:
            answer = await self.http.request(method, path, content=raw, headers=headers, **more)
            said = str(answer.status_code)
        except httpx.TimeoutException:
            said = "timeout"
        except (httpx.HTTPError, UnicodeError, RuntimeError) as error:
            said = type(error).__name__
        finally:
            self.told(
                method, path, said, began, answer.text if answer is not None and answer.status_code >= 500 else ""
            )
        return answer

    def told(self, method: str, path: str, said: str, began: float, text: str = "") -> None:
        """Note how a request was answered."""
        took = round(time.monotonic() - began, 3)
        self.note(request=" ".join(f"{method[:12]} {path[:80]}".split()), said=said, took=took, text=text[:300])

    async def wire(self, data: bytes, *, wait: float = 10.0, drip: tuple[int, float] | None = None) -> str:
        """Bytes as they are on a connection of their own, `drip` = (bytes, s) at a time; the status answered, or what
        became of the connection."""
        began, said = time.monotonic(), "closed"
        host, _, port = self.plan.url.removeprefix("http://").rpartition(":")
        writer = None
        try:
            async with asyncio.timeout(wait):
                reader, writer = await asyncio.open_connection(host, int(port))
                if drip is None:
                    writer.write(data)
                    await writer.drain()
                else:
                    for start in range(0, len(data), drip[0]):
                        writer.write(data[start : start + drip[0]])
                        await writer.drain()
                        await asyncio.sleep(drip[1])
                line = await reader.readline()
                if line.startswith(b"HTTP/1."):
                    said = line.split(b" ")[1].decode()
        except TimeoutError:
            said = "timeout"
        except OSError as error:
            said = type(error).__name__
        finally:
            if writer is not None:
                writer.close()
            self.told("RAW", data[:40].decode("latin-1"), said, began)
        return said

    async def task(self, fields: dict[str, Any], rng: random.Random) -> None:
        """A task by one of the doors, again until it is taken, or refused for itself."""
        for _ in range(_AGAIN):
            answer = await self._task(fields, rng)
            if answer is None or answer.status_code != 429:
                return
            await asyncio.sleep(0.7)

    async def _task(self, fields: dict[str, Any], rng: random.Random) -> httpx.Response | None:
        fields = {"deadline": rng.choice([1, 3, 8]), "max_tokens": rng.choice([1, 16, 200]), **fields}
        endpoint = rng.choice(["tasks", "chat", "completions", "many"])
        body: dict[str, Any] = {"prompt": rng.choice(["Say something.", "x", "List five colours as JSON."]), **fields}
        if endpoint == "many":
            return await self.ask("POST", "/v1/tasks", {"tasks": [body] * rng.choice([1, 3])})
        if endpoint == "chat" and isinstance(body["prompt"], str):
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
            if "json_schema" in body:
                named = {"name": "x", "schema": body.pop("json_schema")}
                body["response_format"] = {"type": "json_schema", "json_schema": named}
            return await self.ask("POST", "/v1/chat/completions", body)
        if endpoint == "completions" and "json_schema" not in body:
            return await self.ask("POST", "/v1/completions", body)
        return await self.ask("POST", "/v1/tasks", body)

    async def upload(self, content: bytes, name: str = "lines.jsonl", **fields: str) -> str | None:
        """A file's id, where it was taken."""
        if self.stored[0] + len(content) > MOST_STORED:
            return None
        files = {"file": (name, content)}
        answer = await self.ask("POST", "/v1/files", data={"purpose": "batch", **fields}, files=files)
        if answer is None or answer.status_code != 200:
            return None
        self.stored[0] += len(content)
        return str(answer.json()["id"])

    async def batch(self, lines: list[Any], window: str = "60s") -> str | None:
        """A batch of these lines: objects, or bytes as they are."""
        url = {"url": "/v1/completions"}
        content = b"\n".join(x if isinstance(x, bytes) else json.dumps(url | x).encode() for x in lines)
        if (file := await self.upload(content)) is None:
            return None
        wanted = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": window}
        answer = await self.ask("POST", "/v1/batches", wanted)
        return str(answer.json()["id"]) if answer is not None and answer.status_code == 200 else None


def sequence(seed: int, kinds: list[str]) -> Iterator[tuple[str, int]]:
    """Kind and number of each attack: first each kind once, then any."""
    rng = random.Random(seed)
    counts = dict.fromkeys(kinds, 0)
    first = rng.sample(kinds, len(kinds))
    while True:
        kind = first.pop() if first else rng.choice(kinds)
        counts[kind] += 1
        yield kind, counts[kind]


async def run(plan: Plan, kinds: dict[str, Attack]) -> None:
    """Attack until the time is up."""
    base = Hostile(plan)
    receivers = [await asyncio.start_server(serve, HERE, 0) for serve in (_silent, _dripping, _endless, _failing)]
    receivers.append(await asyncio.start_server(_redirecting(plan.canary), HERE, 0))
    names = ("silent", "dripping", "endless", "failing", "redirecting")
    for name, server in zip(names, receivers, strict=True):
        base.servers[name] = f"http://{HERE}:{server.sockets[0].getsockname()[1]}/{name}"
    await base.ask("POST", "/v1/webhooks", {"url": base.servers["failing"]})  # so that it is told of all it does
    order = sequence(plan.seed, list(plan.only or kinds))

    async def attack_on() -> None:
        while True:
            kind, number = next(order)
            one = Hostile(plan, kind, number, base)
            one.note(began=True)
            try:
                async with asyncio.timeout(_LONGEST):
                    await kinds[kind](one, random.Random(f"{plan.seed} {kind} {number}"))
            except TimeoutError:
                pass
            except (OSError, httpx.HTTPError, ValueError, KeyError) as error:  # a broken answer is theirs
                one.note(trouble=f"{type(error).__name__}: {str(error)[:200]}")
            await asyncio.sleep(0.05)

    attackers = [asyncio.create_task(attack_on()) for _ in range(_AT_ONCE)]
    try:
        done, _ = await asyncio.wait(attackers, timeout=plan.seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in attackers:
            task.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)


# --- webhook receivers of every evil kind


async def _silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(120)
    writer.close()


async def _dripping(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 50:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.5)


async def _endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for _n in range(2000):
        writer.write(b"X-More: " + b"x" * 8000 + b"\r\n")
        await writer.drain()
    writer.close()


async def _failing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    writer.close()


def _redirecting(to: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(f"HTTP/1.1 307 There\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    return serve


def start_plan(plan: Plan) -> str:
    """The plan as the process's argument."""
    return json.dumps(asdict(plan))
