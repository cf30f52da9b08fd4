"""Grammars and schemas that were written to do harm, or by chance do: whoever sends one hears so, by field, and nobody
else notices."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api import ApiProcess
from support.cluster import Cluster, Process
from support.raw import redis_of
from support.wait import eventually

from perllm.broker import grammar
from perllm.broker.engine.contract import EngineError, Stop
from perllm.broker.errors import InvalidTask, TryAgain
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import TaskSpec
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.settings import EdgeSettings

#: Each with what becomes of it: refused, with words of the reason, or None where it may be used, being bounded.
BOMBS: dict[str, tuple[dict[str, Any], str | None]] = {
    "nesting hidden in classes": (
        {"grammar": "root ::= " + ("(" * 64 + "[" + ")" * 64 + "]") * 503},
        "nested deeper than 64",
    ),
    "nesting": ({"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000}, "nested deeper than 64"),
    "200 options": ({"grammar": "root ::= " + " ".join(['"a"?'] * 200)}, None),
    "9000 options": ({"grammar": "root ::= " + " ".join(['"a"?'] * 9000)}, "too many possibilities"),
    "repetitions": ({"grammar": "root ::= " + " ".join(['"a"{2000}'] * 900)}, None),
    "nested repetitions": ({"grammar": "root ::= " + "(" * 7 + '"a"' + "{0,900})" * 7 + ' "b"'}, None),
    "ambiguity": ({"grammar": 'root ::= root root | "a" | root root root'}, None),
    "blanks among blanks": ({"grammar": 'root ::= (" "* ("a"? " "*)*)* "x"'}, "too many possibilities"),
    "rules that double": (
        {
            "grammar": "root ::= r0\n"
            + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40))
            + '\nr40 ::= "a"? "b"?'
        },
        None,
    ),
    "a chain of rules": (
        {"grammar": "root ::= r0\n" + "\n".join(f'r{i} ::= "x" r{i + 1}' for i in range(3000)) + '\nr3000 ::= "a"'},
        "refer to each other too deeply",
    ),
    "no end": ({"grammar": "root ::= root"}, "no text fits it"),
    "minLength": ({"json_schema": {"type": "string", "minLength": 400_000_000}}, None),
    "minItems": ({"json_schema": {"type": "array", "minItems": 200_000_000}}, None),
    "counters in counters": ({"json_schema": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}}, None),
    "patterns to intersect": (
        {"json_schema": {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(200)]}},
        "takes longer than 1 s to compile",
    ),
    "branches to multiply": (
        {"json_schema": {"allOf": [{"anyOf": [{"minimum": i * 9 + j} for j in range(3)]} for i in range(14)]}},
        "too large",
    ),
    "a chain of references": (
        {"json_schema": {"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1500)}}},
        "json_schema: ",
    ),
    "a circle of references": ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "fits"),
    "look-around": ({"json_schema": {"type": "string", "pattern": "(?=.*a)(?=.*b)"}}, "look-around"),
    "many words": ({"json_schema": {"enum": [f"word {i}" for i in range(4000)]}}, None),
    "what is not supported": (
        {"json_schema": {"type": "object", "properties": {"x": {"not": {}}}}},
        "json_schema: cannot be used: #/properties/x/not",
    ),
    "others' options": ({"json_schema": {"x-guidance": {"lenient": True}, "uniqueItems": True}}, "#/uniqueItems"),
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tiny: Path, valkey: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    given = {"engine": "auto", "model": str(tiny), "model_cache": folder, "threads": 1, "slots": 4}
    with Cluster(valkey.url, folder, **given) as one:
        redis_of(one.ledger).flushall()
        one.scheduler()
        yield one


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Process:
    (one,) = cluster.start_nodes("edge")
    return one


def slow(number: int) -> TaskSpec:
    """A schema that takes too long to compile, unlike any other."""
    pieces = [{"type": "string", "pattern": f".*{number}x{i}.*"} for i in range(200)]
    return TaskSpec(prompt="x", tenant="hostile", json_schema={"allOf": pieces})


# --- what reaches a worker unchecked


def test_a_worker_outlives_every_bomb_and_so_do_the_tasks_beside_it(cluster: Cluster, node: Process) -> None:
    boot = cluster.node("edge")
    neighbours = cluster.submit(3, max_tokens=200)
    sent = {
        name: cluster.submit(max_tokens=60, **{"temperature": 1.0, "seed": 1} | fields)[0]
        for name, (fields, _) in BOMBS.items()
    }
    neighbours += cluster.submit(3, max_tokens=200)
    for task_id in neighbours:
        assert cluster.result(task_id).state == "succeeded"
        assert cluster.task(task_id).strikes == 0
    for name, task_id in sent.items():
        result, expected = cluster.result(task_id), BOMBS[name][1]
        assert cluster.task(task_id).strikes == 0, name
        if expected is None and result.state == "succeeded":
            continue
        assert result.state == "failed", name
        assert (result.reason or "").startswith(("grammar: ", "json_schema: ")), (name, result.reason)
        # Which of its limits a bomb meets first is the machine's to say.
        assert any(said in (result.reason or "") for said in (expected, "simplify it") if said), (name, result.reason)
    assert node.running
    assert cluster.node("edge") == boot


def test_random_grammars_and_schemas_harm_nobody(tiny: Path) -> None:
    """Whatever is given, the answer is a text or one error by field, and the one beside it is whole."""
    dice = random.Random(12)

    def expression(depth: int) -> str:
        pick = dice.randrange(9 if depth else 3)
        if pick < 3:
            return dice.choice(['"a"', '"ab\\n"', "[a-z]", "[^x]", ".", "r1", "root", '""', '"é"'])
        inner = expression(depth - 1)
        if pick < 6:
            return f"({inner}){dice.choice(['*', '+', '?', '{2}', '{0,3}', '{900}', '{3,}', '**'])}"
        return f"({inner} {dice.choice(['|', ''])} {expression(depth - 1)})"

    def schema(depth: int) -> dict[str, Any]:
        part = (lambda: schema(depth - 1)) if depth else (lambda: {"type": "integer"})
        return dice.choice(
            [
                lambda: {"type": "string", "pattern": dice.choice(["a*", "(a|b){9}c?", ".*x.*", "[^]", "("])},
                lambda: {"type": "string", "minLength": dice.choice([0, 3, 10**9]), "maxLength": dice.choice([2, 9])},
                lambda: {"type": "number", "minimum": dice.uniform(-9, 9), "multipleOf": dice.choice([0.3, 7, 0, -1])},
                lambda: {"type": "array", "items": part(), "minItems": dice.choice([0, 2, 10**8])},
                lambda: {"type": "object", "properties": {f"p{i}": part() for i in range(4)}, "required": ["p1", "q"]},
                lambda: {dice.choice(["anyOf", "allOf", "oneOf"]): [part(), part(), part()]},
                lambda: {"$ref": dice.choice(["#", "#/x", "http://localhost:1/x"])},
                lambda: {"type": dice.choice(["null", 5, ["string", "null"], "any"]), "const": dice.choice([1, "x"])},
            ]
        )()  # fmt: skip

    def of(number: int) -> TaskSpec:
        rules = f"root ::= {expression(4)}\nr1 ::= {expression(3)}"
        fields: dict[str, Any] = {"grammar": rules} if number % 2 else {"json_schema": schema(3)}
        return TaskSpec(prompt="Hi.", max_tokens=30, temperature=1.0, seed=number, **fields)

    engine = LlamaEngine(EdgeSettings(model=str(tiny), model_cache=tiny.parent, threads=1, slots=4))
    engine.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            alone = TaskSpec(prompt="Hi.", max_tokens=1800)
            beside = pool.submit(engine.generate, "beside", alone, Stop(120))
            runs = [pool.submit(engine.generate, f"{i}", of(i), Stop(60)) for i in range(40)]
            errors = [error for run in runs if (error := run.exception()) is not None]
            assert 5 < len(errors) < 35
            for error in errors:
                assert isinstance(error, EngineError)
                assert str(error).startswith(("grammar: ", "json_schema: "))
                assert len(str(error)) < 500
                assert not error.retry
            assert beside.result().output.finish_reason in ("length", "stop")
    finally:
        engine.close()


# --- at submission


@pytest.mark.parametrize(("fields", "reason"), [pytest.param(*BOMBS[name], id=name) for name in BOMBS])
def test_validation_says_what_is_wrong_within_seconds(fields: dict[str, Any], reason: str | None) -> None:
    spec = TaskSpec(prompt="x", **fields)
    if reason is None or reason == "too many possibilities":  # found out by sampling only
        grammar.check(spec)
        return
    with pytest.raises(InvalidTask, match=rf"^{next(iter(fields))}: ") as caught:
        grammar.check(spec)
    assert reason in str(caught.value)
    began = time.monotonic()
    with pytest.raises(InvalidTask):
        grammar.check(spec)
    assert time.monotonic() - began < 0.1  # it is known


def test_one_tenants_slow_schemas_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perllm.broker.grammar.checker.BURST", 1.0)
    told: list[type[InvalidTask]] = []

    def attack(number: int) -> None:
        try:
            grammar.check(slow(number), hurried=True)
        except InvalidTask as error:
            told.append(type(error))

    attackers = [threading.Thread(target=attack, args=(n,)) for n in range(50)]
    for thread in attackers:
        thread.start()

    async def others() -> int:
        """Two more tenants, over an event loop that must go on meanwhile."""
        turns, over = 0, asyncio.Event()

        async def tick() -> None:
            nonlocal turns
            while not over.is_set():
                await asyncio.sleep(0)
                turns += 1

        ticking = asyncio.create_task(tick())
        for number in range(10):
            for tenant in ("one", "two"):
                enum = {"enum": [f"{tenant} {number}"]}
                await asyncio.wait_for(
                    grammar.check_from_loop(TaskSpec(prompt="x", tenant=tenant, json_schema=enum)), 20
                )
        over.set()
        await ticking
        return turns

    assert asyncio.run(others()) > 20 * 10  # each of 20 checks takes milliseconds; a turn, microseconds
    for thread in attackers:
        thread.join()
    assert told.count(TryAgain) >= 40
    assert len(told) == 50
    with pytest.raises(InvalidTask, match="longer than 1 s"):  # a worker, which nobody waits for, has it looked at
        grammar.check(slow(99))


def test_the_api_names_the_field_and_a_batch_the_line(cluster: Cluster, node: Process, tmp_path: Path) -> None:
    bad, good = {"grammar": "root ::= ("}, {"grammar": 'root ::= "yes" | "no"'}
    ask = {"model": "auto", "messages": [{"role": "user", "content": "Well?"}], "max_tokens": 8}
    with ApiProcess(cluster.settings.url, tmp_path) as api, api.http() as client:

        def refused(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = client.post(path, json=body)
            assert answer.status_code == 400, answer.text
            error: dict[str, Any] = answer.json()["error"]
            return error

        assert refused("/v1/chat/completions", {**ask, **bad})["param"] == "grammar"
        never = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
        said = refused("/v1/chat/completions", {**ask, "response_format": never})
        assert said["param"] == "response_format"
        assert "#/not" in said["message"]
        assert refused("/v1/tasks", {"tasks": [{"prompt": "x", **good}, {"prompt": "x", **bad}]})["param"] == (
            "tasks.1.grammar"
        )
        answer = client.post("/v1/chat/completions", json={**ask, **good})
        assert answer.json()["choices"][0]["message"]["content"] in ("yes", "no")

        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {**ask, **fields}}
            for name, fields in (("bad", bad), ("good", good))
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}).json()
        wanted = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "10m"}
        batch = client.post("/v1/batches", json=wanted).json()
        done = eventually(lambda: _ended(client, batch["id"]), "the batch has ended")
        assert done["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        assert done["errors"]["data"][0]["line"] == 1
        assert done["errors"]["data"][0]["param"] == "grammar"


def _ended(client: httpx.Client, batch_id: str) -> dict[str, Any] | None:
    batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
    return batch if batch["status"] in ("completed", "failed", "expired") else None


# --- an engine that hangs all the same


def test_a_node_whose_engine_is_stuck_leaves_and_only_what_it_was_at_gets_a_strike(
    cluster: Cluster, node: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.stop()
    found = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))
    stuck = cluster.start_worker("support.stuck_worker", "stuck", node_name="stuck", heartbeat=0.2)
    cluster.await_node(stuck)
    neighbours = cluster.submit(2, max_tokens=1500)
    for task_id in neighbours:
        cluster.await_state(task_id, "running")
    (culprit,) = cluster.submit(prompt="HANG", max_tokens=5)
    assert stuck.wait() == 70
    assert "engine_stuck" in stuck.output
    assert cluster.node("stuck") is None
    assert cluster.task(culprit).strikes == 1
    assert [cluster.task(task_id).strikes for task_id in neighbours] == [0, 0]
    cluster.start_nodes("healthy")
    for task_id in (*neighbours, culprit):
        assert cluster.result(task_id).state == "succeeded"
        assert cluster.task(task_id).strikes == (task_id == culprit)
