"""What of the vLLM engine needs no vLLM: the checks before it is started. The rest is in tests/gpu."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from perllm.broker.errors import BadSetting
from perllm.cloud_worker.settings import CloudSettings
from perllm.cloud_worker.step_cost import TimedStep
from perllm.cloud_worker.vllm_engine import VLLMEngine, _check_memory, _median_decode, _missing_folder, _producer_name


@dataclass
class Card:
    """A GPU with so many GiB free of so many."""

    free: float
    total: float
    name: str = "NVIDIA H200"
    shared: bool = False

    def energy(self) -> float:
        raise NotImplementedError

    power = power_limit = energy

    def memory(self) -> tuple[int, int]:
        return int(self.free * 2**30), int(self.total * 2**30)


def test_too_little_free_memory_says_how_much_there_is_and_what_to_set() -> None:
    _check_memory([Card(135, 140)], 0.92)
    with pytest.raises(
        BadSetting, match=r"NVIDIA H200 has 60\.0 of 140\.0 GiB free.*\"gpu_memory_utilization\": 0\.42"
    ):
        _check_memory([Card(135, 140), Card(60, 140)], 0.92)


def test_a_folder_must_be_a_model_s(tmp_path: Path) -> None:
    assert _missing_folder("org/name") is None
    assert "there is no folder" in (_missing_folder(str(tmp_path / "nowhere")) or "")
    assert "holds no config.json" in (_missing_folder(str(tmp_path)) or "")
    (tmp_path / "config.json").write_text("{}")
    assert _missing_folder(str(tmp_path)) is None


def test_producers_names() -> None:
    assert _producer_name("org/name") == "org/name"
    assert _producer_name("/models/llama-8b/") == "llama-8b"


def test_vllm_needs_a_model() -> None:
    with pytest.raises(BadSetting, match="PERLLM_MODEL"):
        VLLMEngine(CloudSettings.model_validate({"engine": "vllm"}))


def test_slots_are_256_unless_set() -> None:
    assert VLLMEngine(CloudSettings.model_validate({"model": "org/name"})).slots == 256
    assert VLLMEngine(CloudSettings.model_validate({"model": "org/name", "slots": 8})).slots == 8


def test_only_whole_decoding_steps_count_for_the_speed_of_decoding() -> None:
    steps = [
        TimedStep(9.0, 4, 64, 0),
        TimedStep(0.3, 4, 0, 0),
        TimedStep(0.2, 4, 0, 0),
        TimedStep(0.1, 4, 0, 0),
        TimedStep(8.0, 3, 0, 0),
    ]
    assert _median_decode(steps, 4) == TimedStep(0.2, 4, 0, 0)
    assert _median_decode(steps, 5) is None
