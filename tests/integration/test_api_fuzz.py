"""schemathesis on the OpenAPI document: whatever is sent, the API answers in its own words and never with a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from support.api import ApiProcess
from support.cluster import Cluster

from perllm.broker.api.app import make_app
from perllm.broker.api.settings import ApiSettings
from perllm.broker.local.server import EmbeddedServer


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiProcess]:
    folder = tmp_path_factory.mktemp("fuzz")
    with EmbeddedServer(folder) as server, Cluster(server.url, folder) as cluster:
        cluster.scheduler()
        cluster.start_nodes("one", slots=8)
        with ApiProcess(server.url, folder) as running:
            yield running


schema = schemathesis.openapi.from_dict(make_app(ApiSettings()).openapi())


@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_that_is_sent_is_a_server_error(api: ApiProcess, case: Any) -> None:
    answer = case.call(base_url=api.base, headers={"Authorization": f"Bearer {_key(api)}"}, timeout=30)
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


_keys: dict[str, str] = {}


def _key(api: ApiProcess) -> str:
    return _keys.setdefault(api.base, api.key("fuzz"))


def test_every_operation_is_described_with_examples(api: ApiProcess) -> None:
    document = httpx.get(f"{api.base}/openapi.json").json()
    lacking = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            if not operation.get("description") or not operation.get("tags"):
                lacking.append(f"{where}: description")
            for status, answer in operation["responses"].items():
                for kind, content in answer.get("content", {}).items():
                    if kind != "application/octet-stream" and "example" not in content:
                        lacking.append(f"{where}: example of {status}")
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                if "example" not in content and not content.get("examples"):
                    lacking.append(f"{where}: example of its {kind}")
            if path not in ("/health", "/ready") and "401" not in operation["responses"]:
                lacking.append(f"{where}: 401")
    assert lacking == []
    assert len(document["paths"]) >= 20
