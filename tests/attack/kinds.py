"""Every kind of attack, by name. One attack is a few requests; what is in them its random numbers decide."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import redis.asyncio

from attack import bombs
from attack.hostile import CLOSED, HERE, Attack, Hostile

KINDS: dict[str, Attack] = {}

JSON = {"Content-Type": "application/json"}


def kind(attack: Attack) -> Attack:
    KINDS[attack.__name__.replace("_", "-")] = attack  # type: ignore[attr-defined]
    return attack


def several(*things: Awaitable[Any]) -> Awaitable[Any]:
    return asyncio.gather(*things)


def _bomb(name: str, field: str, make: Callable[[random.Random], Any]) -> None:
    async def attack(h: Hostile, rng: random.Random) -> None:
        await h.task({field: make(rng)}, rng)

    attack.__name__ = name
    kind(attack)


for _make in (bombs.nested, bombs.ambiguous, bombs.repeated, bombs.recursive, bombs.noisy):
    _bomb(f"grammar-{_make.__name__}", "grammar", _make)
for _make in (bombs.bounded, bombs.deep, bombs.referring, bombs.patterned):  # type: ignore[assignment]
    _bomb(f"schema-{_make.__name__}", "json_schema", _make)


# --- bodies and heads


@kind
async def odd_fields(h: Hostile, rng: random.Random) -> None:
    """A request that is right but for one field."""
    names = (
        "prompt", "messages", "deadline", "value", "max_tokens", "model", "service", "tenant", "expected_tokens",
        "idempotency_key", "stream", "metadata", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs",
        "json_schema", "grammar", "n", "tools", "user", "response_format", "input", "tasks", "repeat_penalty",
    )  # fmt: skip
    for _ in range(5):
        name = rng.choice(names)
        good = "" if name == "prompt" else '"prompt": "Hi", "deadline": 2, "max_tokens": 2, '
        raw = ("{" + good + f'"{name}": {bombs.odd_value(rng)}' + "}").encode("utf-8", "surrogatepass")
        path = rng.choice(["/v1/tasks", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/batches"])
        await h.ask("POST", path, raw=raw, headers=JSON)


@kind
async def malformed_bodies(h: Hostile, rng: random.Random) -> None:
    good = b'{"prompt": "Hi", "max_tokens": 2, "deadline": 2}'
    at = rng.randrange(len(good))
    raw = rng.choice([
        good[:at], good[:at] + rng.randbytes(3) + good[at:], rng.randbytes(500), b"", b"\xef\xbb\xbf" + good,
        good.decode().encode("utf-16"), good * 2, b"null", b"7", b'"x"', b"[" * 100_000, good.replace(b"Hi", b"\xff"),
    ])  # fmt: skip
    types = (
        "application/json",
        "text/plain",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "",
        "a/b; c=\xff",
    )
    headers = {"Content-Type": rng.choice(types), "Content-Encoding": rng.choice(["identity", "gzip", "br"])}
    path = rng.choice(
        ["/v1/tasks", "/v1/chat/completions", "/v1/responses", "/v1/files", "/v1/batches", "/v1/webhooks"]
    )
    await h.ask("POST", path, raw=raw, headers={k: v.encode("latin-1") for k, v in headers.items()})


@kind
async def huge_bodies(h: Hostile, rng: random.Random) -> None:
    size = int(10 ** rng.uniform(5.5, 7.1))
    prompt = rng.choice(["x", "word ", "😀", "\\u0041", "\n", "<|im_end|>"])
    raw = (
        b'{"deadline": 3, "max_tokens": 2, "prompt": "'
        + (prompt * (size // len(prompt))).replace("\n", "\\n").encode()
        + b'"}'
    )
    await h.ask("POST", rng.choice(["/v1/tasks", "/v1/completions"]), raw=raw, headers=JSON)


@kind
async def surrogates(h: Hostile, rng: random.Random) -> None:
    """Characters that no text may hold, everywhere."""
    half = rng.choice([b'"\\ud800"', b'"a\\udfff b"', b'"\\ud83d\\ud83d"', b'"\\u0000"'])
    body = rng.choice([
        b'{"deadline": 3, "max_tokens": 2, "prompt": %s}',
        b'{"deadline": 3, "max_tokens": 2, "messages": [{"role": "user", "content": %s}]}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "stop": [%s]}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "metadata": {%s: "b"}}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "metadata": {"b": %s}}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "idempotency_key": %s}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "json_schema": {"const": %s}}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "grammar": %s}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "service": %s}',
        b'{"deadline": 3, "max_tokens": 2, "prompt": "a", "model": %s}',
    ])  # fmt: skip
    await h.ask("POST", "/v1/tasks", raw=body % half, headers=JSON)
    await h.ask("POST", "/v1/webhooks", raw=b'{"url": %s}' % half, headers=JSON)
    await h.ask("POST", "/v1/batches", raw=b'{"input_file_id": %s, "endpoint": "/v1/completions"}' % half, headers=JSON)


@kind
async def heads(h: Hostile, rng: random.Random) -> None:
    """Methods, paths and headers that nobody sends, and a look at how they were counted."""

    async def one() -> None:
        long = "A" * rng.choice([100, 20_000, 31_000, 70_000])
        anonymous = f"{''.join(rng.choices('ABCDEFGHIJKLMNOP', k=12))}{long[:20_000]} / HTTP/1.1\r\nHost: x\r\n\r\n"
        await h.wire(rng.choice([
            anonymous, anonymous, anonymous.replace(" / ", " /v1/tasks "),
            f"GET /{long} HTTP/1.1\r\nHost: x\r\n\r\n",
            f"GET /v1/tasks?{long}={long} HTTP/1.1\r\nHost: x\r\n\r\n",
            f"GET /health HTTP/1.1\r\nHost: x\r\nX-A: {long}\r\n\r\n",
            "GET /health HTTP/1.1\r\nHost: x\r\n" + "X: y\r\n" * 5000 + "\r\n",
            "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST /v1/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nx",
            "GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            "GET /health HTTP/9.9\r\n\r\n", "GET http://evil.example/health HTTP/1.1\r\nHost: y\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00", "\r\n\r\n\r\n",
            "GET / HTTP/1.1\nHost: x\n\n",
            "GET /v1/tasks/%00%ff%2e%2e%2f HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + h.plan.key + "\r\n\r\n",
        ]).encode("latin-1"))  # fmt: skip

    await several(*(one() for _ in range(20)))
    await h.ask("GET", "/metrics")


@kind
async def dripped_bodies(h: Hostile, rng: random.Random) -> None:
    """Requests that take for ever to come, before and after they are answered."""
    authority = rng.choice([f"Authorization: Bearer {h.plan.key}\r\n", ""])
    length = rng.choice([1000, 100_000, 50_000_000])
    path = rng.choice(["/v1/tasks", "/v1/files", "/nowhere"])
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{authority}Content-Length: {length}\r\n\r\n"
    data = rng.choice([head + "x" * 200, head[: rng.randrange(10, len(head))] + " " * 50]).encode()
    await several(*(h.wire(data, wait=40, drip=(rng.choice([1, 8]), rng.choice([0.1, 0.4]))) for _ in range(20)))


@kind
async def idle_connections(h: Hostile, rng: random.Random) -> None:
    await several(*(h.wire(rng.choice([b"", b"G", b"GET /health HT"]), wait=15) for _ in range(100)))


@kind
async def keys(h: Hostile, rng: random.Random) -> None:
    """Nobody's keys, and others' things."""
    secret = base64.urlsafe_b64encode(rng.randbytes(32)).decode()[:43]
    wrong = [f"perllm_{rng.randbytes(6).hex()}_{secret}", "x" * 5000, "", h.plan.key[:-1] + "!", h.plan.key + "\u00e9"]
    for _ in range(10):
        headers = {
            "Authorization": rng.choice(["Bearer ", "Basic ", "bearer  ", ""]).encode() + rng.choice(wrong).encode()
        }
        await h.ask(rng.choice(["GET", "POST", "DELETE"]), "/v1/tasks", key=None, headers=headers)
    identity = str(UUID(bytes=rng.randbytes(16)))
    for path in ("tasks/..%2f..%2fnodes", f"tasks/{identity}", f"tasks/{identity}/explain", f"responses/{identity}",
                 f"files/file-{identity}/content", "files/..%2f..%2fvalkey.conf/content", f"batches/{identity}",
                 f"webhooks/{identity}/deliveries", "models/" + "a/" * 500):  # fmt: skip
        await h.ask(rng.choice(["GET", "GET", "DELETE", "PATCH"]), f"/v1/{path}")


# --- webhooks


@kind
async def hooks(h: Hostile, rng: random.Random) -> None:
    """Addresses that are forbidden, silent, slow, or lead elsewhere; as many as there may be."""
    port = h.plan.canary.rpartition(":")[2].strip("/")
    forbidden = [
        h.plan.canary, f"http://localhost:{port}", f"http://[::1]:{port}", f"http://[::ffff:127.0.0.1]:{port}",
        f"http://2130706433:{port}", f"http://0x7f.1:{port}", f"http://0:{port}", f"http://0177.0.0.1:{port}",
        f"http://[::127.0.0.1]:{port}", f"http://[::ffff:0:127.0.0.1]:{port}", f"http://[64:ff9b::7f00:1]:{port}",
        f"http://[64:ff9b:1::7f00:1]:{port}", "http://[fec0::1]", "http://168.63.129.16", "http://169.254.169.254/",
        "http://10.0.0.1", "http://192.168.0.1", "http://100.64.0.1", "http://[fe80::1%25lo]", "http://224.0.0.1",
        "gopher://127.0.0.1", "file:///etc/passwd", "http://a@127.0.0.3", f"http://{HERE}:99999", "http://", "x" * 3000,
        "http://127.0.0.3#@x", "http://①②⑦.⓪.⓪.①", "http://127.0.0.3\\@127.0.0.1", "http://[", "http://x\r\nHost: y",
    ]  # fmt: skip
    for url in rng.sample(forbidden, 4):
        await h.ask("POST", "/v1/webhooks", {"url": url})
    slow = [*h.servers.values(), CLOSED, f"http://a{rng.random()}.rebind.test:{port}", "http://203.0.113.1/"]
    for url in rng.sample(slow, 4):
        await h.ask("POST", "/v1/webhooks", {"url": url, "events": ["task.succeeded", "task.cancelled", "task.failed"]})
    await _trigger(h, rng)


@kind
async def silent_names(h: Hostile, rng: random.Random) -> None:
    """Names whose server never answers."""
    urls = [f"http://h{rng.randrange(10**6)}.silent.test/" for _ in range(8)]
    await several(*(h.ask("POST", "/v1/webhooks", {"url": url}) for url in urls))


@kind
async def deliveries(h: Hostile, rng: random.Random) -> None:
    """Many deliveries to slow receivers, and the same ones again and again."""
    answer = await h.ask("GET", "/v1/webhooks")
    found = answer.json()["data"] if answer is not None and answer.status_code == 200 else []
    for hook in rng.sample(found, min(2, len(found))):
        made = await h.ask("GET", f"/v1/webhooks/{hook['id']}/deliveries?limit=20")
        rows = made.json()["data"] if made is not None and made.status_code == 200 else []
        for row in rows[:6]:
            await h.ask("POST", f"/v1/webhooks/{hook['id']}/deliveries/{row['id']}/replay")
    if len(found) > 15:
        await h.ask("DELETE", f"/v1/webhooks/{rng.choice(found)['id']}")
    await _trigger(h, rng)


async def _trigger(h: Hostile, rng: random.Random) -> None:
    """Tasks that end at once, to be told of."""
    for _ in range(4):
        answer = await h.ask("POST", "/v1/tasks", {"prompt": "x", "max_tokens": 1, "deadline": 5})
        if answer is not None and answer.status_code == 200 and rng.random() < 0.5:
            await h.ask("POST", f"/v1/tasks/{answer.json()['id']}/cancel")


# --- batches and files


@kind
async def batch_of_bad_lines(h: Hostile, rng: random.Random) -> None:
    bad: list[Any] = [b"{", b"", b"nonsense", b'{"custom_id": 1}', {"custom_id": "x", "body": {"nope": 1}}, b"[" * 5000]
    lines = [rng.choice(bad) for _ in range(int(10 ** rng.uniform(2, 4.69)))]
    await several(*(h.batch(lines) for _ in range(rng.choice([1, 5]))))


@kind
async def batch_of_bombs(h: Hostile, rng: random.Random) -> None:
    """Lines that each would be refused, or worse, and lone surrogates among good ones."""

    def line(n: int) -> Any:
        body: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
        match rng.choice(["grammar", "schema", "surrogate", "deep", "good"]):
            case "grammar":
                make = rng.choice([bombs.nested, bombs.ambiguous, bombs.repeated, bombs.recursive, bombs.noisy])
                body["grammar"] = make(rng)
            case "schema":
                make_schema = rng.choice([bombs.bounded, bombs.deep, bombs.referring, bombs.patterned])
                body["json_schema"] = make_schema(rng)
            case "surrogate":
                return b'{"custom_id": "s%d", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}' % n
            case "deep":
                return b'{"custom_id": "d%d", "url": "/v1/completions", "body": %s}' % (
                    n,
                    b'{"a":' * 3000 + b"1" + b"}" * 3000,
                )
        return {"custom_id": str(n), "body": body}

    await h.batch([line(n) for n in range(rng.choice([3, 30, 100]))])


@kind
async def batch_floods(h: Hostile, rng: random.Random) -> None:
    """More tasks than the key may have, of the highest value there is."""
    count = int(10 ** rng.uniform(2, 4.3))
    body = {"prompt": "Tell a long story.", "max_tokens": rng.choice([1, 100]), "value": rng.choice([1, 1e6])}
    window = rng.choice(["5s", "20s", "30d"])
    identity = await h.batch([{"custom_id": str(n), "body": body} for n in range(count)], window)
    if identity is not None:
        await asyncio.sleep(rng.uniform(0, 10))
        await h.ask("POST", f"/v1/batches/{identity}/cancel")


@kind
async def uploads(h: Hostile, rng: random.Random) -> None:
    """Files, ever more; some break off, some are no form at all."""
    content = rng.randbytes(1000) * int(10 ** rng.uniform(0, 4.2))
    await h.upload(content, rng.choice(["a.jsonl", "../../x", "a" * 300, "a\r\nb", "", "é\u202e.jsonl"]))
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {h.plan.key}\r\nContent-Length: 5000000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form-data; name=file; "
        "filename=x\r\n\r\n"
    )
    await h.wire(head.encode() + bytes(2_000_000), wait=rng.choice([0.5, 3]))
    form = rng.choice([b"--b", b"--b\r\n" * 9000, b"--b\r\n" + b"A: b\r\n" * 9000, b"--b\r\n\r\n\r\n--b--"])
    await h.ask("POST", "/v1/files", raw=form, headers={"Content-Type": "multipart/form-data; boundary=b"})


# --- tasks


@kind
async def task_floods(h: Hostile, rng: random.Random) -> None:
    """As many as go into one request, with deadlines and values at the ends of what there is."""
    one = {
        "prompt": "x" * int(10 ** rng.uniform(0, 3.8)),
        "deadline": rng.choice([1e-9, 0.001, 5, 30, 2_592_000]),
        "value": rng.choice([1e-300, 1, 1, 1e6]),
        "max_tokens": rng.choice([1, 8, 300]),
    }
    await h.ask("POST", "/v1/tasks", {"tasks": [one] * rng.choice([1, 6, 100, 1000])})
    if one["deadline"] > 60:
        await _cancel_some(h, rng)


async def _cancel_some(h: Hostile, rng: random.Random) -> None:
    for state in ("pending", "dispatched", "running"):
        answer = await h.ask("GET", f"/v1/tasks?state={state}&limit=20")
        rows = answer.json()["data"] if answer is not None and answer.status_code == 200 else []
        for row in rows:
            if rng.random() < 0.5:
                await h.ask(
                    *rng.choice([("POST", f"/v1/tasks/{row['id']}/cancel"), ("DELETE", f"/v1/tasks/{row['id']}")])
                )


@kind
async def cancellations(h: Hostile, rng: random.Random) -> None:
    await _cancel_some(h, rng)


@kind
async def services(h: Hostile, rng: random.Random) -> None:
    """Ever new service classes."""
    for _ in range(rng.choice([5, 20])):
        service = f"s{rng.randrange(10**9)}" + "x" * rng.choice([0, 100])
        fields = {"prompt": "x", "max_tokens": 1, "deadline": 4, "service": service}
        await h.ask("POST", "/v1/tasks", {"tasks": [{**fields, "service": f"{service}{i}"} for i in range(3)]})


@kind
async def long_prompts(h: Hostile, rng: random.Random) -> None:
    """Prompts at the edge of the context and beyond, with all that costs."""
    words = int(10 ** rng.uniform(2.5, 5))
    fields = {
        "prompt": " ".join(rng.choices(["sky", "blue", "<|im_start|>", "\x00", "😀" * 9, "ﷺ", "\u0301" * 50], k=words)),
        "logprobs": rng.choice([0, 20]),
        "stop": [chr(97 + i) * 200 for i in range(16)],
        "top_k": rng.choice([0, 1, 2**31 - 1]),
        "temperature": rng.choice([0, 2, 1e-300]),
        "repeat_penalty": rng.choice([1e-300, 1, 2]),
        "max_tokens": rng.choice([1, 2000, 1_000_000]),
        "deadline": 4,
    }
    await h.task(fields, rng)


@kind
async def idempotency(h: Hostile, rng: random.Random) -> None:
    """One key for many tasks, at once and in turn."""
    word = rng.choice(["k", "😀" * 64, "a b", "{perllm}:task:x", "\u0000", "x" * 256])
    fields = {"idempotency_key": f"{word[:240]}{rng.randrange(9)}", "deadline": 3, "max_tokens": 1}
    tasks = [{**fields, "prompt": f"{n}"} for n in range(3)]
    await h.ask("POST", "/v1/tasks", {"tasks": tasks})
    await several(*(h.ask("POST", "/v1/tasks", rng.choice(tasks)) for _ in range(6)))
    header = {"Idempotency-Key": fields["idempotency_key"].encode()}
    await h.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "deadline": 3}, headers=header)


# --- reading


@kind
async def listings(h: Hostile, rng: random.Random) -> None:
    """Lists that find nothing, many at a time."""
    query = [
        "tasks?service=nope", "tasks?service=nope&order=asc&limit=100", "tasks?model=nope", "tasks?state=failed",
        "tasks?after=nope", f"tasks?limit={10**20}", "tasks?state=nope", "tasks?limit=-1", "files?purpose=nope",
        "files?limit=10000", "files?after=%00", "batches?after=%F0%9F%98%80", "batches?limit=100", "nodes", "models",
    ]  # fmt: skip
    await several(*(h.ask("GET", f"/v1/{rng.choice(query)}") for _ in range(12)))
    await h.ask("GET", "/metrics", key=rng.choice(["", None]))
    await h.ask(rng.choice(["GET", "HEAD", "OPTIONS"]), rng.choice(["/docs", "/openapi.json", "/ready", "/nowhere"]))


@kind
async def idle_streams(h: Hostile, rng: random.Random) -> None:
    """Streams that are opened and not read, of one task and of many."""
    body = {"input": "Tell a long story.", "background": True, "stream": True, "max_output_tokens": 400, "deadline": 10}
    request = json.dumps(body).encode()
    head = f"HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {h.plan.key}\r\n"
    made = await h.ask("POST", "/v1/responses", {**body, "stream": False})
    identity = made.json()["id"] if made is not None and made.status_code == 200 else "nope"
    watch = f"GET /v1/responses/{identity}?stream=true {head}\r\n".encode()
    begin = f"POST /v1/responses {head}Content-Length: {len(request)}\r\n\r\n".encode() + request
    await several(*(_held(h, watch if n % 5 else begin, rng.uniform(1, 12)) for n in range(15)))


async def _held(h: Hostile, data: bytes, seconds: float) -> None:
    """A request whose answer is not read for so long."""
    host, _, port = h.plan.url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    try:
        writer.write(data)
        await asyncio.sleep(seconds)
    finally:
        writer.transport.abort()
        h.note(request=data[:40].decode("latin-1"), said="left", took=seconds, text="")


@kind
async def disconnects(h: Hostile, rng: random.Random) -> None:
    """Clients that ask and go."""
    body = {"prompt": "Tell a long story.", "max_tokens": 300, "deadline": 5, "stream": rng.random() < 0.5}
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {h.plan.key}\r\n"
    data = f"{head}Content-Length: {len(raw)}\r\nContent-Type: application/json\r\n\r\n".encode() + raw
    await several(*(_held(h, data, rng.uniform(0, 0.6)) for _ in range(6)))


# --- other doors


@kind
async def flower(h: Hostile, rng: random.Random) -> None:
    """What a page in the operator's browser may send to Flower."""
    workers = ["edge.e1@perllm", "edge.e2@perllm", "inbox@perllm", "webhooks@perllm"]
    origin = {"Origin": "https://evil.example", "Referer": "https://evil.example/"}
    headers = rng.choice([origin, {**origin, "Host": "evil.example"}, {"Host": "evil.example"}])
    for _ in range(3):
        path = rng.choice([
            "worker/shutdown/{}", "worker/pool/restart/{}", "worker/pool/shrink/{}?n=9", "task/revoke/x?terminate=true",
            "worker/queue/cancel-consumer/{}?queue=edge.e1", "task/rate-limit/perllm.run?workername={}&ratelimit=0",
            "task/async-apply/perllm.generate",
        ]).format(rng.choice(workers))  # fmt: skip
        type_ = {"Content-Type": rng.choice(["text/plain", "application/x-www-form-urlencoded"])}
        await h.ask("POST", f"{h.plan.flower}/api/{path}", raw=b"{}", key=None, headers=headers | type_)
    page = rng.choice(["tasks?limit=100000", "workers?refresh=1", "task/info/x"])
    await h.ask("GET", f"{h.plan.flower}/api/{page}", key=None, headers=headers)


@kind
async def inbox(h: Hostile, rng: random.Random) -> None:
    """What a Celery producer with a password may put into the queue `inbox`: no task of ours among it."""
    task = {"lang": "py", "task": rng.choice(["perllm.generate", "nope", "", None, 7]), "id": str(rng.random())}
    arguments = rng.choice(
        [b"[[], {}, {}]", b"[]", b"[" * 5000, b'[[1],{"prompt":7},{}]', b"\xff", b'[[],{"a":NaN},{}]']
    )
    message = {
        "body": rng.choice([base64.b64encode(arguments).decode(), "!", 7]),
        "content-encoding": rng.choice(["utf-8", "nope", "binary"]),
        "content-type": rng.choice(["application/json", "application/x-python-serialize", "application/x-yaml", "x"]),
        "headers": rng.choice(
            [task, {}, None, {**task, "eta": "nope"}, {**task, "expires": -1}, {**task, "retries": "x"}]
        ),
        "properties": {
            "delivery_tag": str(rng.random()),
            "delivery_info": rng.choice([{"exchange": "", "routing_key": "inbox"}, {}]),
            "body_encoding": rng.choice(["base64", "nope"]),
            "reply_to": "x" * 2000,
            "correlation_id": task["id"],
        },
    }
    raw = rng.choice(
        [json.dumps(message).encode(), rng.randbytes(200), b"{}", b"[]", b'{"a":' * 900 + b"1" + b"}" * 900]
    )
    async with redis.asyncio.Redis.from_url(h.plan.inbox) as client:
        await client.lpush("inbox", raw)
    h.note(request="LPUSH inbox", said="taken", took=0.0, text="")
