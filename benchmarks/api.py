"""`make bench-api`: what the HTTP API costs over a bare FastAPI endpoint, batches of 50,000 lines, and embeddings.

- submission: POST /v1/tasks, ours stored in the ledger against a bare endpoint that checks the same body and stores
  nothing; the same connections and requests, alternating, medians over the rounds; requests/s and p50, p99 in ms;
- streams: from the moment the engine made a piece of an answer until a client of the API has it, ms: of the last piece
  in each event (what the way costs), and of each piece (with the time pieces are gathered for); one stream, and 16 at
  once, of a piece every 20 ms;
- batch: upload and creation until every line is checked and in the ledger (accepted, s), the API process's largest
  resident memory (MB), and whether every line is in the output or the error file, once. The system runs meanwhile: one
  node with the emulated engine, which does nothing at once. The same with lines of chats and lines of embeddings;
- embeddings: 512 texts in one request, through the API and a node with llama.cpp, against the same engine called in
  this process, and against llama-cpp-python's own batches of 512 tokens; the small model, mean pooling, one thread;
  alternating, medians over the rounds, s;
- a tool call: the same way, one required call of a strict tool, the same tokens by both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.common import SCHEDULER, celery_worker, child, emit, median_and_spread
from perllm import Client
from perllm.broker.connection import connect
from perllm.broker.engine.contract import Stop
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import TaskSpec
from perllm.broker.openai.translation import task_fields
from perllm.broker.settings import load_settings

TASK = {"prompt": "Why is the sky blue? Answer in one short sentence.", "max_tokens": 32, "deadline": 600}
#: Every so many lines of the batch one is no request.
BAD_EVERY = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3000, help="requests per round and side")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--pieces", type=int, default=250, help="pieces of each stream")
    parser.add_argument("--lines", type=int, default=50_000, help="lines of a batch")
    parser.add_argument("--inputs", type=int, default=512, help="texts embedded in one request")
    parser.add_argument("--real-rounds", type=int, default=3)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(EmbeddedServer(folder))
        os.environ.update(
            PERLLM_REDIS_URL=server.url,
            PERLLM_DATA_DIR=str(folder),
            PERLLM_SLOTS="64",
            PERLLM_ENGINE="emulated",
            PERLLM_POLICY="least-loaded",
            PERLLM_API_OPEN="true",
        )
        samples: dict[str, list[float]] = {}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            round_figures = submissions(folder, options.requests, options.connections) | streams(folder, options.pieces)
            for name, value in round_figures.items():
                samples.setdefault(name, []).append(value)
        figures, spread = median_and_spread(samples)
        for endpoint in ("/v1/chat/completions", "/v1/embeddings"):
            print(f"a batch of {options.lines} lines, {endpoint}", file=sys.stderr)
            figures |= batch(folder, options.lines, endpoint)
        print(f"{options.inputs} embeddings in one request, and tool calls", file=sys.stderr)
        real, real_spread = median_and_spread(real_model(folder, options.inputs, options.real_rounds))
        figures |= real
        for ratio, ours in (
            ("embed_512_engine", "embed_512"),
            ("embed_512_llama_cpp", "embed_512"),
            ("tool_call_engine", "tool_call"),
        ):
            figures[f"{ratio}_over_api"] = real[f"{ratio}_s"] / real[f"{ours}_api_s"]
        spread |= real_spread
    emit(
        "api",
        figures,
        spread,
        rounds=options.rounds,
        requests=options.requests,
        connections=options.connections,
        pieces=options.pieces,
        batch_lines=options.lines,
        embedded_inputs=options.inputs,
        real_rounds=options.real_rounds,
        engine="emulated, no delay",
    )


# --- submissions


def submissions(folder: Path, requests: int, connections: int) -> dict[str, float]:
    """Both sides once, each in a fresh process, the ledger cleared between."""
    bare = _side(folder, "bare", [sys.executable, "-m", "benchmarks.bare_fastapi"], requests, connections)
    ours = _side(folder, "api", [sys.executable, "-m", "perllm.broker.api", "--port"], requests, connections)
    _clear()
    return {
        "submit_per_s": ours["per_s"],
        "bare_fastapi_per_s": bare["per_s"],
        "submit_over_bare_fastapi": ours["per_s"] / bare["per_s"],
        "submit_p50_ms": ours["p50_ms"],
        "submit_p99_ms": ours["p99_ms"],
        "bare_fastapi_p50_ms": bare["p50_ms"],
        "bare_fastapi_p99_ms": bare["p99_ms"],
    }


def _side(folder: Path, name: str, command: list[str], requests: int, connections: int) -> dict[str, float]:
    port = _free_port()
    with child(folder / f"{name}.log", [*command, str(port)]):
        _await(port)
        asyncio.run(_load(port, requests // 5, connections))  # warm
        began = time.perf_counter()
        latencies = asyncio.run(_load(port, requests, connections))
        took = time.perf_counter() - began
    cuts = statistics.quantiles(latencies, n=100)
    return {"per_s": len(latencies) / took, "p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98]}


async def _load(port: int, requests: int, connections: int) -> list[float]:
    """Seconds each request took, over connections that each send the next when the last is answered. Written on bare
    sockets: a client library would take longer than the server."""
    body = json.dumps(TASK).encode()
    kind = "Content-Type: application/json"
    head = f"POST /v1/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    request, latencies, left = head.encode() + body, [], requests

    async def one() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            began = time.perf_counter()
            writer.write(request)
            answered = await reader.readuntil(b"\r\n\r\n")
            assert answered.startswith(b"HTTP/1.1 200"), answered
            length = int(answered.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            latencies.append(time.perf_counter() - began)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(one() for _ in range(connections)))
    return latencies


# --- streams


def streams(folder: Path, pieces: int) -> dict[str, float]:
    """One stream, then 16 at once."""
    port = _free_port()
    with ExitStack() as stack:
        stack.enter_context(child(folder / "scheduler.log", SCHEDULER))
        stack.enter_context(child(folder / "node.log", celery_worker("benchmarks.stamping_worker")))
        stack.enter_context(child(folder / "api.log", [sys.executable, "-m", "perllm.broker.api", "--port", str(port)]))
        _await(port)
        while httpx.get(f"http://127.0.0.1:{port}/ready").status_code != 200:
            time.sleep(0.1)
        asyncio.run(_watch(port, 20))  # warm
        figures = {}
        for count, name in ((1, "stream"), (16, "stream_of_16")):
            event, each = asyncio.run(_watch_many(port, pieces, count))
            cuts = statistics.quantiles(event, n=100)
            figures |= {f"{name}_event_p50_ms": 1e3 * cuts[49], f"{name}_event_p99_ms": 1e3 * cuts[98]}
            figures |= {f"{name}_piece_p50_ms": 1e3 * statistics.median(each)}
            figures |= {f"{name}_pieces_per_event": len(each) / len(event)}
    _clear()
    return figures


async def _watch_many(port: int, pieces: int, count: int) -> tuple[list[float], list[float]]:
    watched = await asyncio.gather(*(_watch(port, pieces) for _ in range(count)))
    return [delay for event, _ in watched for delay in event], [delay for _, each in watched for delay in each]


async def _watch(port: int, pieces: int) -> tuple[list[float], list[float]]:
    """Seconds each event's last piece, and each piece, was on its way. The engine and we read the same clock."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": pieces, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    event, each = [], []
    while (line := await reader.readline()) != b"data: [DONE]\n":
        now = time.monotonic_ns()
        assert line, "the stream was cut"
        if line.startswith(b"data: ") and (choices := json.loads(line[6:])["choices"]):
            stamps = [int(stamp) for stamp in (choices[0]["delta"].get("content") or "").split()]
            event += [(now - stamp) / 1e9 for stamp in stamps[-1:]]
            each += [(now - stamp) / 1e9 for stamp in stamps]
    writer.close()
    await writer.wait_closed()
    return event, each


# --- a batch


def batch(folder: Path, lines: int, endpoint: str) -> dict[str, float]:
    """Accept it, watch the memory, and count every line."""
    path, embeds = folder / "batch.jsonl", endpoint == "/v1/embeddings"
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            if number % BAD_EVERY == BAD_EVERY - 1:
                file.write('{"custom_id": "cut", "body": {\n')
                continue
            asked = {"messages": [{"role": "user", "content": TASK["prompt"]}], "max_tokens": 32}
            body = {"model": "emulated", **({"input": TASK["prompt"]} if embeds else asked)}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": endpoint, "body": body}
            file.write(json.dumps(line) + "\n")
    port = _free_port()
    with ExitStack() as stack:
        stack.enter_context(child(folder / "scheduler.log", SCHEDULER))
        stack.enter_context(child(folder / "node.log", celery_worker("perllm.edge_worker")))
        command = [sys.executable, "-m", "perllm.broker.api", "--port", str(port)]
        api = stack.enter_context(child(folder / "api.log", command))
        _await(port)
        http = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600))
        while http.get("/ready").status_code != 200:
            time.sleep(0.1)
        began = time.perf_counter()
        with path.open("rb") as content:
            uploaded = http.post("/v1/files", files={"file": ("batch.jsonl", content)}, data={"purpose": "batch"})
        upload = time.perf_counter() - began
        wanted = {
            "input_file_id": uploaded.raise_for_status().json()["id"],
            "endpoint": endpoint,
            "completion_window": "1h",
        }
        made = http.post("/v1/batches", json=wanted).raise_for_status().json()
        while (state := http.get(f"/v1/batches/{made['id']}").json())["status"] == "validating":
            time.sleep(0.05)
        accepted = time.perf_counter() - began
        while (state := http.get(f"/v1/batches/{made['id']}").json())["status"] in ("in_progress", "finalizing"):
            print(f"  {state['request_counts']}", file=sys.stderr)
            time.sleep(2)
        done = time.perf_counter() - began
        assert state["status"] == "completed", state
        outcomes: list[str] = []
        for file in filter(None, (state["output_file_id"], state["error_file_id"])):
            with http.stream("GET", f"/v1/files/{file}/content") as file_lines:
                outcomes += [json.loads(line)["custom_id"] or "bad" for line in file_lines.iter_lines()]
        peak = _peak_rss(api.pid)
    _clear()
    bad = lines // BAD_EVERY
    whole = {f"line-{n}" for n in range(lines) if n % BAD_EVERY != BAD_EVERY - 1}
    lost = len(whole - set(outcomes)) + max(0, bad - outcomes.count("bad"))
    doubled = len(outcomes) - len(set(outcomes)) - max(0, outcomes.count("bad") - 1)
    figures = {
        "accept_s": accepted,
        "upload_s": upload,
        "rss_mb": peak,
        "lost": lost,
        "doubled": doubled,
        "bad_lines": bad,
        "per_s": lines / done,
        "file_mb": path.stat().st_size / 1e6,
    }
    return {f"{'embed_' if embeds else ''}batch_50k_{name}": value for name, value in figures.items()}


def _peak_rss(pid: int) -> float:
    """The most memory a process has had resident so far, MB."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    return float(psutil.Process(pid).memory_info().rss / 1e6)


# --- with a real model


def real_model(folder: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds until all texts are embedded, and until a tool is called, by each way, in each round."""
    from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama  # noqa: PLC0415  of the edge's extra

    from perllm.edge_worker.engine import LlamaEngine  # noqa: PLC0415
    from perllm.edge_worker.model_files import DEFAULT_QUANTISATION, default_gguf, quantised  # noqa: PLC0415
    from perllm.edge_worker.settings import EdgeSettings  # noqa: PLC0415

    texts = [f"Number {number} of a few short sentences about the sea." for number in range(count)]
    settings = load_settings(EdgeSettings, engine="llama", pooling="mean", threads=1)
    gguf = quantised(default_gguf(), DEFAULT_QUANTISATION, settings.model_cache)
    peer = Llama(
        str(gguf), embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN, flash_attn=True, verbose=False,
        n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=1, n_threads_batch=1,
    )  # fmt: skip
    engine = LlamaEngine(settings)
    engine.start()
    generates, model = (offer.name for offer in engine.offers())
    port = _free_port()
    with ExitStack() as stack:
        stack.callback(engine.close)
        stack.enter_context(child(folder / "scheduler.log", SCHEDULER))
        own = {"PERLLM_ENGINE": "llama", "PERLLM_POOLING": "mean", "PERLLM_THREADS": "1"}
        stack.enter_context(child(folder / "node.log", celery_worker("perllm.edge_worker"), **own))
        command = [sys.executable, "-m", "perllm.broker.api", "--port", str(port)]
        stack.enter_context(child(folder / "api.log", command))
        _await(port)
        http = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600))
        while http.get("/ready").status_code != 200:
            time.sleep(0.1)

        def by_api(texts: list[str]) -> None:
            asked = {"model": model, "input": texts, "encoding_format": "base64", "deadline": 600}
            assert len(http.post("/v1/embeddings", json=asked).raise_for_status().json()["data"]) == len(texts)

        def by_engine(texts: list[str]) -> None:
            spec = TaskSpec(kind="embed", model=model, inputs=tuple(texts))
            assert len(engine.generate("t", spec, Stop(600)).output.vectors or ()) == len(texts)

        def call_by_api(place: str) -> None:
            asked = {"model": generates, **_tool_call(place), "deadline": 600}
            answer = http.post("/v1/chat/completions", json=asked).raise_for_status().json()
            assert answer["choices"][0]["message"]["tool_calls"], answer

        def call_by_engine(place: str) -> None:
            fields = {"model": generates, **task_fields(_tool_call(place))}
            assert engine.generate("t", TaskSpec.model_validate(fields), Stop(600)).output.tool_calls

        embed: dict[str, Callable[[Any], Any]] = {"api": by_api, "engine": by_engine}
        embed["llama_cpp"] = lambda texts: peer.embed(texts, normalize=True)
        call: dict[str, Callable[[Any], Any]] = {"api": call_by_api, "engine": call_by_engine}
        samples: dict[str, list[float]] = {}
        for number in range(-1, rounds):  # the first one warms up
            for what, ways, given in (
                ("embed_512", embed, texts if number >= 0 else texts[:8]),
                *(("tool_call", call, f"place {number} {n}") for n in range(4)),
            ):
                for name, way in ways.items():
                    began = time.perf_counter()
                    way(given)
                    if number >= 0:
                        samples.setdefault(f"{what}_{name}_s", []).append(time.perf_counter() - began)
                        print(f"  {what}, {name}: {samples[f'{what}_{name}_s'][-1]:.2f} s", file=sys.stderr)
    return samples


def _tool_call(place: str) -> dict[str, Any]:
    """A request that must call a strict tool, as OpenAI's API has it."""
    properties = {"place": {"type": "string", "maxLength": 40}, "unit": {"enum": ["celsius", "fahrenheit"]}}
    schema = {"type": "object", "properties": properties, "required": ["place", "unit"], "additionalProperties": False}
    tool = {"name": "weather", "description": "The weather at a place", "parameters": schema, "strict": True}
    return {
        "messages": [{"role": "user", "content": f"How is the weather in {place}?"}],
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": "required",
        "max_tokens": 64,
        "temperature": 0,
    }


# --- processes


def _clear() -> None:
    """Nothing of what was is to take room from what follows."""
    with Client() as client, connect(client.settings) as server:
        server.flushdb()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(port: int) -> None:
    give_up = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
        else:
            return


if __name__ == "__main__":
    main()
