"""Which engine a cloud worker gets, and what a user is told who asks for one that is not to be had."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from perllm.broker.errors import BadSetting
from perllm.cloud_worker import celery
from perllm.cloud_worker.settings import CloudSettings


def settings(**given: Any) -> CloudSettings:
    return CloudSettings.model_validate(given)


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return celery.make_engine


def test_without_a_gpu_llama_cpp_stands_in(make_engine: Any) -> None:
    pytest.importorskip("llama_cpp")
    engine = make_engine(settings(slots=3))
    assert type(engine).__name__ == "LlamaEngine"
    assert engine.slots == 3


def test_vllm_without_a_gpu_is_refused_with_the_reason(make_engine: Any) -> None:
    with pytest.raises(BadSetting, match=r"PERLLM_ENGINE=vllm cannot be used: .*CUDA_VISIBLE_DEVICES"):
        make_engine(settings(engine="vllm", model="some/model"))


def test_a_remote_server_needs_an_address(make_engine: Any) -> None:
    with pytest.raises(BadSetting, match="PERLLM_OPENAI_BASE_URL"):
        make_engine(settings(engine="openai"))


def test_the_emulated_engine_says_so(make_engine: Any) -> None:
    assert "emulated" in make_engine(settings(engine="emulated")).description


def test_the_worker_ends_with_one_line() -> None:
    environment = {**os.environ, "PERLLM_ENGINE": "vllm", "PERLLM_MODEL": "some/model", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "celery", "-A", "perllm.cloud_worker", "worker"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: PERLLM_ENGINE=vllm cannot be used: ")
    assert ended.stderr.count("\n") == 1
