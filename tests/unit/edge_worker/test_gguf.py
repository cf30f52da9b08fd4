"""GGUF heads: what is read, and that no damage gets past as anything but one clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_gguf import F32, STRING, U32, pair, write

from perllm.broker.errors import BadSetting
from perllm.edge_worker.gguf import GGUF, read_gguf
from perllm.edge_worker.model_files import base_name, default_gguf, model_name
from perllm.edge_worker.settings import EdgeSettings


def small(path: Path) -> Path:
    """A well-formed file of a few hundred bytes."""
    pairs = [
        pair("general.architecture", STRING, "llama"),
        pair("general.file_type", U32, 7),
        pair("llama.context_length", U32, 2048),
        pair("llama.block_count", U32, 2),
        pair("llama.embedding_length", U32, 64),
        pair("llama.attention.head_count", U32, 4),
        pair("llama.attention.head_count_kv", U32, 2),
        pair("llama.rope.freq_base", F32, 1e4),
    ]
    return write(path, pairs, {"a": np.ones((4, 8)), "b": np.ones(3)})


def test_the_head_is_read(tmp_path: Path) -> None:
    gguf = read_gguf(small(tmp_path / "m.gguf"))
    assert (gguf.architecture, gguf.quantisation, gguf.context, gguf.tensors) == ("llama", "q8_0", 2048, 2)
    assert gguf.kv_bytes_per_token == 2 * 2 * (2 * 16 + 2 * 16)  # 16-bit, layers, keys and values


def test_the_default_model_is_found_without_importing_its_package() -> None:
    gguf = read_gguf(default_gguf())
    assert gguf.architecture == "llama"
    assert gguf.quantisation == "q4_1"
    assert gguf.kv_bytes_per_token == 23_040


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_file_cut_short_anywhere_is_refused(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 32))])
    with pytest.raises(BadSetting, match=r"cut\.gguf.*(cut short|not a GGUF|damaged)"):
        read_gguf(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500)
@given(data=st.data())
def test_damage_raises_nothing_but_bad_setting(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    try:
        gguf = read_gguf(path)
    except BadSetting as error:
        message = str(error)
    else:
        message = f"damaged.gguf {gguf.kv_bytes_per_token} {gguf.context} {gguf.quantisation}"
    assert "damaged.gguf" in message


def test_what_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("This is a poem, and not a model at all.")
    with pytest.raises(BadSetting, match="is not a GGUF file"):
        read_gguf(tmp_path / "text")
    with pytest.raises(BadSetting, match=r"no model file .*nowhere.*PERLLM_MODEL"):
        read_gguf(tmp_path / "nowhere")
    with pytest.raises(BadSetting, match="cannot read the model file"):
        read_gguf(tmp_path)


@pytest.mark.parametrize(
    ("file", "quantisation", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "q4_1", "smollm2-135m-instruct"),
        ("Meta-Llama-3-8B-Instruct-Q4_K_M.gguf", "q4_k_m", "meta-llama-3-8b-instruct"),
        ("model.gguf", "f16", "model"),
        ("ünïcode (1).gguf", "q8_0", "n-code-1"),
        ("....gguf", "q8_0", "model"),
    ],
)
def test_names(file: str, quantisation: str, name: str) -> None:
    kinds = {"q4_1": 3, "q4_k_m": 15, "f16": 1, "q8_0": 7}
    gguf = GGUF(Path(file), 0, {"general.file_type": kinds[quantisation]}, 0)
    assert base_name(gguf) == name
    assert model_name(EdgeSettings(), gguf) == f"{name}:{quantisation}"
    assert model_name(EdgeSettings(model_name="mine"), gguf) == "mine"
    assert model_name(EdgeSettings(model_name="mine", variants="q8_0,q4_0"), gguf) == f"mine:{quantisation}"
