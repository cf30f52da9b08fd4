"""The `perllm` command as its users run it, against a running system with the emulated engine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.make import node_info
from support.ports import free_port
from support.raw import redis_of
from support.wait import eventually

from perllm import Client, InvalidTask
from perllm.broker.local.supervisor import Supervisor
from perllm.broker.messages import new_id
from perllm.broker.settings import Settings

PERLLM = str(Path(sys.executable).with_name("perllm"))
EMULATED = {"PERLLM_ENGINE": "emulated", "PERLLM_SLOTS": "4", "PERLLM_EMULATED_SPEED": "200"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    settings = Settings(data_dir=tmp_path_factory.mktemp("stack"))
    nodes = dict.fromkeys(("one", "two"), EMULATED)
    with Supervisor(settings, edges=("one", "two"), clouds=(), node_environment=nodes) as running:
        eventually(lambda: not running.waiting_for(), "both nodes are up")
        yield running


def perllm(
    url: str | None, *arguments: str, cwd: Path | None = None, columns: int = 120
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), **({"PERLLM_REDIS_URL": url} if url else {})}
    done = subprocess.run(
        [PERLLM, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_a_prompt_from_submission_to_explanation(stack: Supervisor) -> None:
    done = perllm(stack.url, "submit", "Why is the sky blue?", "--max-tokens", "3", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["state"] == "succeeded"
    assert result["output"]["text"] == "word word word"
    explained = perllm(stack.url, "explain", result["id"])
    assert result["receipt"]["node"] in explained.stdout
    status = json.loads(perllm(stack.url, "status", result["id"], "--json").stdout)
    assert status["result"] == result


def test_all_answers_are_printed(stack: Supervisor) -> None:
    with Client(stack.url) as client:
        task_id = client.submit("hi", max_tokens=2, n=3).id
    done = perllm(stack.url, "result", task_id)
    assert done.stdout.splitlines() == ["word word"] * 3
    assert [f"answer {i}:" in done.stderr for i in range(4)] == [True, True, True, False]
    assert "6 tokens" in done.stderr


def test_a_running_task_is_cancelled(stack: Supervisor) -> None:
    task_id = perllm(stack.url, "submit", "slow", "--max-tokens", "4000").stdout.strip()
    eventually(
        lambda: json.loads(perllm(stack.url, "status", task_id, "--json").stdout)["state"] == "running", "it runs"
    )
    assert "was running" in perllm(stack.url, "cancel", task_id).stdout
    waited = perllm(stack.url, "result", task_id, "--json")
    assert waited.returncode == 1
    assert json.loads(waited.stdout)["state"] == "cancelled"


def test_good_lines_of_a_file_run_beside_a_bad_one(stack: Supervisor, tmp_path: Path) -> None:
    lines = [json.dumps({"custom_id": str(n), "body": {"prompt": "hi", "max_tokens": 2}}) for n in range(1, 11)]
    lines[6] = '{"custom_id": "7", "body": {"prompt": "hi", "max_tokens": 2'
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(lines))
    done = perllm(stack.url, "submit", str(path), "--wait", "--json")
    assert done.returncode == 1
    assert f"{path}:7: not JSON" in done.stderr
    report = json.loads(done.stdout)
    assert (report["submitted"], report["errors"]) == (9, 1)
    output = [json.loads(x) for x in (tmp_path / "tasks.output.jsonl").read_text().splitlines()]
    assert [x["custom_id"] for x in output] == [str(n) for n in range(1, 11) if n != 7]
    (error,) = [json.loads(x) for x in (tmp_path / "tasks.errors.jsonl").read_text().splitlines()]
    assert "line 7" in error["error"]["message"]


def test_the_same_batch_name_runs_nothing_twice(stack: Supervisor, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"custom_id": "a", "body": {"prompt": "hi", "max_tokens": 2}}))
    first, again = (
        json.loads(perllm(stack.url, "submit", str(path), "--batch", "b1", "--json").stdout)["task_ids"]
        for _ in range(2)
    )
    assert first == again


def test_lists_speak_json(stack: Supervisor) -> None:
    nodes = json.loads(perllm(stack.url, "nodes", "--json").stdout)
    assert {n["node"]["name"] for n in nodes} == {"one", "two"}
    assert {n["state"] for n in nodes} == {"up"}
    assert isinstance(json.loads(perllm(stack.url, "tasks", "--json").stdout), list)
    assert json.loads(perllm(stack.url, "dead", "list", "--json").stdout) == []
    assert set(json.loads(perllm(stack.url, "status", "--json").stdout)) == {"tasks", "totals", "nodes"}


def test_a_dead_node_is_shown_as_dead_and_what_was_learned_with_the_live(stack: Supervisor) -> None:
    with Client(stack.url) as client:
        ledger = client.ledger
        ledger.register(node_info("mortal"))
        redis_of(ledger).zadd("{perllm}:nodes", {"mortal": 1})
        eventually(lambda: "one" in ledger.learned() and any(not gone.left for gone in ledger.gone()), "it is dead")
        shown = {n["node"]["name"]: n for n in json.loads(perllm(stack.url, "nodes", "--json").stdout)}
        assert shown["mortal"]["state"] == "dead"
        assert shown["one"]["learned"]["bandwidth"] > 0
        assert "dead since" in perllm(stack.url, "nodes").stdout
        assert "mortal" not in perllm(stack.url, "nodes", "--live", "--json").stdout
        redis_of(ledger).hdel("{perllm}:gone", "mortal")


def test_a_short_id_will_do_and_tables_fit_80_columns(stack: Supervisor) -> None:
    prompt, alike = "a long prompt " * 20, [f"alike-{new_id()}" for _ in range(2)]
    with Client(stack.url) as client:
        spec = client.accept({"prompt": prompt, "deadline": 600, "start_after": 500})
        ids = [*alike, *(new_id() for _ in range(3))]
        client.ledger.submit([(task_id, spec) for task_id in ids])
    told = {
        name: perllm(stack.url, *name.split(), columns=80) for name in ("tasks --state pending", "nodes", "dead list")
    }
    for done in told.values():
        assert max(map(len, done.stdout.splitlines())) <= 80
    shown = [row.split()[:2] for row in told["tasks --state pending"].stdout.splitlines() if " pending " in row]
    assert len(shown) == len(ids)
    found = [[task_id for task_id in ids if task_id.startswith(short)] for short, _ in shown]
    assert sorted(found) == sorted([task_id] for task_id in ids)
    assert json.loads(perllm(stack.url, "status", shown[0][0], "--json").stdout)["id"] == found[0][0]
    wide = perllm(stack.url, "tasks", "--state", "pending", "--wide", columns=80).stdout
    assert all(task_id in wide for task_id in ids)
    both = perllm(stack.url, "cancel", "alike-")
    assert both.returncode == 1
    assert "several tasks begin with 'alike-'" in both.stderr
    assert all(task_id in both.stderr for task_id in alike)
    assert perllm(stack.url, "explain", "no-such-thing").returncode == 1
    assert perllm(stack.url, "cancel", *(short for short, _ in shown)).stdout.count("cancelled (was pending)") == len(
        ids
    )


def test_a_dead_task_is_listed_and_retried_as_a_new_one(stack: Supervisor) -> None:
    # 4,100 tokens of prompt pass the door, which estimates, and fail for good in the engine, which counts.
    task_id = perllm(stack.url, "submit", "x" * 4 * 4090, "--max-tokens", "50").stdout.strip()
    assert perllm(stack.url, "result", task_id).returncode == 1
    dead = json.loads(perllm(stack.url, "dead", "list", "--json").stdout)
    assert [d["id"] for d in dead] == [task_id]
    assert "exceed the context" in dead[0]["reason"]
    again = json.loads(perllm(stack.url, "dead", "retry", "--all", "--json").stdout)
    assert set(again) == {task_id}
    assert again[task_id] != task_id


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["submit", ""], "prompt"),
        (["submit", "x" * 1_100_000], "prompt"),
        (["submit", "hi", "--deadline", "-5"], "deadline"),
        (["submit", "hi", "--value", "nan"], "value"),
        (["submit", "hi", "--model", "nobody-has-it"], "model"),
        (["submit", "hi", "--max-tokens", "5000"], "max_tokens"),
        (["submit", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["submit", "hi", "--batch", "b"], "--batch"),
        (["result", "no-such-task"], "no-such-task"),
        (["explain", "no-such-task"], "no-such-task"),
        (["dead", "retry"], "--all"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(stack: Supervisor, arguments: list[str], named: str) -> None:
    if any(len(a) > 100_000 for a in arguments):  # beyond what a command line holds: as a producer would send it
        with pytest.raises(InvalidTask, match=named), Client(stack.url) as client:
            client.submit(arguments[1])
        return
    done = perllm(stack.url, *arguments)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_without_a_server_it_says_where_it_looked(tmp_path: Path) -> None:
    done = perllm(f"unix://{tmp_path}/none.sock", "status")
    assert done.returncode == 1
    assert f"{tmp_path}/none.sock" in done.stderr


def test_a_wrong_scheme_names_the_variable() -> None:
    done = perllm("http://localhost", "status")
    assert done.returncode == 1
    assert "PERLLM_REDIS_URL" in done.stderr


def test_an_occupied_flower_port_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {**os.environ, "PERLLM_DATA_DIR": str(tmp_path)}
        done = subprocess.run(
            [PERLLM, "up", "--flower-port", str(port), "--api-port", "0"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert f"port {port} is in use" in done.stderr
    assert not (tmp_path / "valkey.sock").exists()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`perllm up` with emulated engines, everything started; killed at the end if it is still there."""
    environment = {**os.environ, **EMULATED, "PERLLM_DATA_DIR": str(tmp_path)}
    told = tmp_path / "up.txt"
    with told.open("w") as said:
        running = subprocess.Popen(
            [PERLLM, "up", "--flower-port", "0", "--api-port", str(free_port())],
            env=environment,
            stdout=said,
            stderr=said,
        )
    try:
        eventually(lambda: "Ctrl-C stops everything" in told.read_text() or running.poll() is not None, "up")
        assert running.poll() is None, told.read_text()
        yield running
    finally:
        running.kill()
        running.wait()


#: A producer that has nothing but Celery, and the URL.
BARE_PRODUCER = """
import sys, celery
app = celery.Celery(broker=sys.argv[1], backend=sys.argv[1])
def generate(**fields):
    return app.signature("perllm.generate", kwargs=fields | {"deadline": 600}, queue="inbox")
print(celery.chain(generate(prompt="hi", max_tokens=2), generate(max_tokens=3))().get(timeout=120)["output"]["text"])
slow = generate(prompt="hi", max_tokens=4000).apply_async()
slow.revoke(terminate=True)
slow.get(timeout=60, propagate=False)
print(slow.state, any(name.startswith("perllm") for name in sys.modules))
"""


def test_up_runs_until_interrupted_and_leaves_nothing(up: subprocess.Popen[bytes], tmp_path: Path) -> None:
    children = _descendants(up.pid)
    told = re.search(r"^Celery: (\S+)$", (tmp_path / "up.txt").read_text(), re.MULTILINE)
    assert told is not None
    bare = [sys.executable, "-c", BARE_PRODUCER, told[1]]
    produced = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    assert produced.stdout.splitlines() == ["word word word", "REVOKED False"], produced.stderr
    assert len(children) >= 8  # server, scheduler, inbox, three workers, the HTTP API and its webhooks
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=60) == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_killing_up_kills_all_it_started(up: subprocess.Popen[bytes]) -> None:
    children = _descendants(up.pid)
    assert len(children) >= 8
    up.kill()
    up.wait()
    eventually(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()], "all children are gone")


def _descendants(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}
