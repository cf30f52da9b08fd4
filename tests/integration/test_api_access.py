"""Who may use the API: with and without keys, its settings, the limits that keys have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.api import ApiProcess
from support.ports import free_port
from support.raw import redis_of

from perllm.broker.api.keys import Keys
from perllm.broker.api.store import ApiStore
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import TaskSpec


@pytest.fixture(scope="module")
def opened(valkey: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("open")
    with ApiProcess(valkey.url, folder, api_open="true", api_cors='["https://app.example"]') as running:
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
