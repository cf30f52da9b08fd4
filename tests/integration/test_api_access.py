"""Who may use the API: with and without keys, its settings, the limits that keys have. What every answer has, and the
pages for people."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from support.api import ApiProcess
from support.ports import free_port
from support.raw import redis_of
from support.wait import eventually

from perllm.broker.api.keys import Keys
from perllm.broker.api.store import ApiStore
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import TaskSpec


@pytest.fixture(scope="module")
def opened(valkey: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("open")
    settings = {"api_open": "true", "api_cors": '["https://app.example"]', "log_level": "debug", "log_json": "true"}
    with ApiProcess(valkey.url, folder, **settings) as running:
        yield running


def test_without_a_key_one_is_the_default_tenant(opened: ApiProcess) -> None:
    for headers in ({}, {"Authorization": "Bearer made-up"}):
        made = httpx.post(f"{opened.base}/v1/tasks", json={"prompt": "hi"}, headers=headers)
        assert made.status_code == 200
        record = opened.ledger.task(made.json()["id"])
        assert record is not None
        assert record.spec.tenant == "default"


def test_a_key_still_opens_its_own_tenant_and_a_wrong_one_nothing(opened: ApiProcess) -> None:
    key = opened.key("mine")
    made = httpx.post(f"{opened.base}/v1/tasks", json={"prompt": "hi"}, headers={"Authorization": f"Bearer {key}"})
    record = opened.ledger.task(made.json()["id"])
    assert record is not None
    assert record.spec.tenant == "mine"
    wrong = {"Authorization": f"Bearer {key[:-1]}{'A' if key[-1] != 'A' else 'B'}"}
    assert httpx.get(f"{opened.base}/v1/models", headers=wrong).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Origin": "https://app.example"}, 200),
        ({"Host": "localhost"}, 200),
        ({}, 200),
    ],
)
def test_a_page_in_a_browser_does_not_get_in(opened: ApiProcess, headers: dict[str, str], status: int) -> None:
    assert httpx.get(f"{opened.base}/v1/models", headers=headers).status_code == status


def test_an_allowed_origin_is_told_so(opened: ApiProcess) -> None:
    answer = httpx.get(f"{opened.base}/v1/models", headers={"Origin": "https://app.example"})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_it_is_healthy_but_not_ready_without_a_scheduler(opened: ApiProcess) -> None:
    assert httpx.get(f"{opened.base}/health").status_code == 200
    answer = httpx.get(f"{opened.base}/ready")
    assert answer.status_code == 503
    assert "scheduler" in answer.json()["status"]


# --- every answer has the request's name


def test_a_request_keeps_the_name_its_client_gave_it(opened: ApiProcess) -> None:
    for name in ("order-4711", "a" * 128, "00-4bf92f3577b34da6/x:1=@+"):
        assert httpx.get(f"{opened.base}/health", headers={"x-request-id": name}).headers["x-request-id"] == name
    made_up = {httpx.get(f"{opened.base}/health").headers["x-request-id"] for _ in range(2)}
    assert len(made_up) == 2
    for bad in ("", "a" * 129, "a b", 'a"b', "\xe4"):
        given = httpx.get(f"{opened.base}/health", headers={"x-request-id": bad.encode("latin-1")})
        assert given.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/tasks/nobody", {}, 404),
        ("GET", "/nowhere", {}, 404),
        ("PUT", "/health", {}, 405),
        ("BREW", "/health", {}, 405),
        ("GET", "/v1/models", {"Host": "evil.example"}, 403),
        ("POST", "/v1/tasks", {"Transfer-Encoding": "chunked"}, 400),
        ("POST", "/v1/chat/completions", {}, 400),
        ("GET", "/v1/models", {"Authorization": "Bearer perllm_x_y"}, None),
    ],
)
def test_an_error_has_the_requests_name_too(
    opened: ApiProcess, method: str, path: str, headers: dict[str, str], status: int | None
) -> None:
    answer = httpx.request(method, f"{opened.base}{path}", headers={**headers, "x-request-id": "mine"})
    assert status in (None, answer.status_code)
    assert answer.headers["x-request-id"] == "mine"


def test_what_is_no_http_has_a_name(opened: ApiProcess) -> None:
    with socket.create_connection(("127.0.0.1", opened.port), timeout=10) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"x-request-id: req_" in answer
    assert b'"invalid_request_error"' in answer


def test_the_log_and_the_client_know_it_by_the_same_name(opened: ApiProcess) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        OpenAI(base_url=f"{opened.base}/v1", api_key="any", max_retries=0).models.retrieve("nobody's")
    name = caught.value.request_id
    assert name
    lines = eventually(
        lambda: [line for line in opened.log.read_text().splitlines() if f'"{name}"' in line], "the log names it"
    )
    assert json.loads(lines[0])["event"] == "request"
    assert json.loads(lines[0])["status"] == 404


# --- pages for people


def test_the_root_says_what_this_is(opened: ApiProcess) -> None:
    about = httpx.get(opened.base).json()
    assert about["name"] == "PerLLM"
    for path in (*about["docs"], about["openapi"], about["health"][0]):
        assert httpx.get(f"{opened.base}{path}").status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_page_needs_nothing_from_elsewhere_and_runs_no_other_script(opened: ApiProcess, path: str) -> None:
    page = httpx.get(f"{opened.base}{path}")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert re.findall(r"<script(?! src=)[^>]*>|<script[^>]*>\s*\S+</script>| on\w+=", page.text) == []
    used = re.findall(r'(?:src|href|spec-url)="([^"]+)"', page.text)
    assert len(used) >= 3
    for name in used:
        asset = httpx.get(f"{opened.base}/{name}")  # relative to the page, so that a proxy may put a path before it
        assert asset.status_code == 200, name
        assert len(asset.content) > 60
    assert httpx.get(f"{opened.base}/pages/__init__.py").status_code == 404


def api(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perllm.broker.api", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_mistake_in_the_settings_is_one_line(valkey: EmbeddedServer, opened: ApiProcess, tmp_path: Path) -> None:
    url = {"PERLLM_REDIS_URL": valkey.url, "PERLLM_DATA_DIR": str(tmp_path), "PERLLM_API_PORT": str(free_port())}
    for more, named in (
        ({"PERLLM_API_OPEN": "true", "PERLLM_API_HOST": "0.0.0.0"}, "PERLLM_API_OPEN"),
        ({"PERLLM_API_PORT": str(opened.port)}, "PERLLM_API_PORT"),
        ({"PERLLM_WEBHOOK_ALLOW": '["10.0.0.0/99"]'}, "PERLLM_WEBHOOK_ALLOW"),
        ({"PERLLM_API_FILES": "nonsense://x"}, "PERLLM_API_FILES"),
        ({"PERLLM_REDIS_URL": f"unix://{tmp_path}/none.sock"}, "none.sock"),
    ):
        done = api({**url, **more})
        assert done.returncode != 0
        assert named in done.stderr
        assert "Traceback" not in done.stderr
    assert "perllm api keys list" in api(url, "keys", "revoke", "nobody").stderr


def test_a_webhook_worker_says_a_mistake_in_one_line_and_its_module_can_be_imported(tmp_path: Path) -> None:
    celery = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "perllm.broker.api", "worker"]
    for wrong, named in (
        ({"PERLLM_WEBHOOK_ALLOW": '["10.0.0.0/99"]'}, "PERLLM_WEBHOOK_ALLOW"),
        ({"PERLLM_REDIS_URL": f"unix://{tmp_path}/none.sock"}, "none.sock"),
    ):
        environment = {**os.environ, **wrong}
        done = subprocess.run(celery, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line]
        assert line.startswith("error: ")
        assert named in line
        imported = [sys.executable, "-c", "import perllm.broker.api.celery"]
        subprocess.run(imported, env=environment, check=True, timeout=60)


def test_a_server_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server, ApiProcess(server.url, tmp_path) as running:
        http = running.http()
        http.timeout = httpx.Timeout(60)
        assert http.get("/v1/models").status_code == 200
        server.stop()
        answer = http.post("/v1/tasks", json={"prompt": "hi"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert httpx.get(f"{running.base}/health").status_code == 200


# --- limits


@pytest.fixture
def keys(ledger: Ledger, store: ApiStore) -> Keys:
    return Keys(store, ledger)


def test_a_rate_lets_a_burst_of_a_second_through_and_then_says_how_long_to_wait(keys: Keys) -> None:
    key, _ = keys.make("t", "", 5.0, None)
    waits = [keys.wait(key) for _ in range(12)]
    assert waits[:5] == [0.0] * 5
    assert all(0 < wait <= 1.0 for wait in waits[7:])


def test_a_slow_rate_lets_one_through(keys: Keys) -> None:
    key, _ = keys.make("t", "", 0.01, None)
    first, second = keys.wait(key), keys.wait(key)
    assert first == 0.0
    assert 90 < second <= 100


def test_only_unfinished_tasks_count(keys: Keys, ledger: Ledger) -> None:
    key, _ = keys.make("t", "", None, 3)
    ids = ledger.submit((f"t{n}", TaskSpec(prompt="hi", deadline=600)) for n in range(3))
    assert keys.reserve(key, dict.fromkeys(ids[:2], 600.0))
    assert not keys.reserve(key, {ids[2]: 600.0, "more": 600.0})  # both or none
    assert keys.reserve(key, {ids[2]: 600.0})
    assert not keys.reserve(key, {"one-more": 600.0})
    ledger.cancel(ids[0])
    assert keys.reserve(key, {"one-more": 600.0})


def test_a_secret_is_not_kept(keys: Keys, ledger: Ledger) -> None:
    key, secret = keys.make("t", "", None, None)
    assert keys.find(secret) == key
    kept = [redis_of(ledger).dump(name) or b"" for name in redis_of(ledger).scan_iter()]
    assert not [raw for raw in kept if secret.split("_", 2)[2].encode() in raw]
    assert keys.find(secret.replace(key.id, "0" * 12)) is None
    keys.revoke(key.id)
    assert keys.find(secret) is None
    assert [k.revoked is not None for k in keys.list()] == [True]
