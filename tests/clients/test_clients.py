"""`make test-clients`: other people's clients against a whole system with the real model, unchanged but for
the address.

Each is a program beside this module, as a user of its library would write it, which says nothing where all is well; it
runs in the environment its library is installed in (`.build/clients/`, by make), and is skipped by name without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.ports import free_port
from support.wait import eventually

from perllm.broker.local.supervisor import START_TIMEOUT, Supervisor
from perllm.broker.settings import load_settings

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".build" / "clients"
#: Seconds a client may take, on a machine that is busy.
LIMIT = 400

pytestmark = pytest.mark.timeout(LIMIT + START_TIMEOUT)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A system of two edge nodes, one of which embeds too: where it is, as clients are told it."""
    port = free_port()
    supervisor = Supervisor(
        load_settings(data_dir=tmp_path_factory.mktemp("system")),
        edges=("writer", "embedder"),
        clouds=(),
        api_port=port,
        node_environment={"embedder": {"PERLLM_POOLING": "mean"}},
    )
    with supervisor as running:
        eventually(lambda: not running.waiting_for(), "all nodes are there", START_TIMEOUT)
        eventually(lambda: is_ready(port), "a scheduler leads", START_TIMEOUT)
        yield {
            "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1",
            "OPENAI_API_KEY": "any",
            "CELERY_BROKER_URL": running.settings.celery_url,
        }


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("program", "environment"),
    [
        ("openai_sdk", "openai-3"),
        ("openai_sdk", "openai-2"),
        ("langchain_client", "openai-3"),
        ("pydantic_ai_client", "openai-3"),
        ("agents_client", "openai-3"),
        ("celery_producer", "openai-3"),
        ("litellm_client", "openai-2"),
        ("instructor_client", "openai-2"),
        ("llama_index_client", "openai-2"),
    ],
)
def test_python(program: str, environment: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not (ENVIRONMENTS / environment / ".complete").exists():
        pytest.skip(f"{program}: its environment {environment} is not installed (make test-clients)")
    succeeds([str(python), str(HERE / f"{program}.py")], request, tmp_path)


def test_node(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    installed = ENVIRONMENTS / "node"
    if not (installed / ".complete").exists() or not shutil.which("node"):
        pytest.skip("node: its environment is not installed (make test-clients)")
    shutil.copy(HERE / "node.mjs", installed)  # modules are looked for beside it
    succeeds(["node", str(installed / "node.mjs")], request, tmp_path)


def succeeds(command: list[str], request: pytest.FixtureRequest, folder: Path) -> None:
    told: dict[str, str] = request.getfixturevalue("system")  # not started where all are skipped
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env={**kept, **told}, cwd=folder, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert not done.stdout
