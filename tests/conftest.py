"""Fixtures shared by all tests. Servers and workers are real processes; each dies with the test run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from support import users
from support.raw import redis_of
from support.servers import DebianRedis, Server, skip_without_debian_redis

from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer

# A shell that runs the tests in the background has its children ignore SIGINT; those we start must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("perllm", deadline=None, print_blob=True)
hypothesis.settings.load_profile("perllm")


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """Tests do not see the developer's PERLLM_* variables."""
    kept = {k: os.environ.pop(k) for k in list(os.environ) if k.startswith("PERLLM_")}
    yield
    os.environ.update(kept)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The embedded server."""
    with EmbeddedServer(tmp_path_factory.mktemp("valkey"), users=users.rules()) as server:
        yield server


@pytest.fixture(scope="session", params=["valkey", "debian_redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Each kind of server the system supports, in turn."""
    if request.param == "valkey":
        yield request.getfixturevalue("valkey")
    else:
        skip_without_debian_redis()
        with DebianRedis(tmp_path_factory.mktemp("redis")) as redis_server:
            users.create(redis_server.url)
            yield redis_server


@pytest.fixture(scope="module", params=["valkey", "debian_redis"])
def own_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same, but one that no other module empties."""
    folder = tmp_path_factory.mktemp("server")
    if request.param != "valkey":
        skip_without_debian_redis()
    with EmbeddedServer(folder) if request.param == "valkey" else DebianRedis(folder) as started:
        users.create(started.url)
        yield started


@pytest.fixture
def settings(server: Server) -> ApiSettings:
    """Settings for an empty server. Leases outlast any test, so that only tests decide what lapses."""
    return ApiSettings.model_validate({"redis_url": server.url, "lease": 300, "heartbeat": 60})


@pytest.fixture
def store(settings: ApiSettings) -> Iterator[ApiStore]:
    """The API's part of the same server."""
    one = ApiStore(settings)
    yield one
    one.close()


@pytest.fixture
def ledger(settings: ApiSettings) -> Iterator[Ledger]:
    """A ledger on an empty server."""
    one = Ledger(settings)
    redis_of(one).flushall()
    yield one
    one.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of random weights that llama.cpp steps through in a fraction of a millisecond."""
    from support.tiny_gguf import tiny_llama  # noqa: PLC0415  needs llama-cpp-python

    return tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
