"""The head of a GGUF file: metadata and tensor extents, read and checked without llama.cpp.

llama.cpp may abort the whole process on a file that lies about itself, so a file is looked at here first. Layout as in
the GGUF specification (ggml repository, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perllm.broker.errors import BadSetting

_MAGIC = b"GGUF"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4

#: ggml type → (values per block, bytes per block); `enum ggml_type` and its block structs in ggml-common.h
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip

#: `general.file_type` → the quantisation's usual name (`enum llama_ftype` in llama.h)
_FILE_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k", 11: "q3_k_s", 12: "q3_k_m",
    13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s", 17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs", 20: "iq2_xs",
    21: "q2_k_s", 22: "iq3_xs", 23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_s", 27: "iq3_m", 28: "iq2_s",
    29: "iq2_m", 30: "iq4_xs", 31: "iq1_m", 32: "bf16", 36: "tq1_0", 37: "tq2_0", 38: "mxfp4",
}  # fmt: skip

#: `<architecture>.pooling_type` → how the tokens' vectors become one (`enum llama_pooling_type` in llama.h); `rank` is
#: a score.
POOLINGS = {1: "mean", 2: "cls", 3: "last", 4: "rank"}


@dataclass(frozen=True, slots=True)
class GGUF:
    """What a file says of itself. Arrays in the metadata are given by their length only."""

    path: Path
    size: int  # bytes
    metadata: Mapping[str, Any]
    tensors: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def quantisation(self) -> str:
        """E.g. `q8_0`; `gguf` where the file does not say."""
        return _FILE_TYPES.get(self.metadata.get("general.file_type", -1), "gguf")

    @property
    def context(self) -> int:
        """Tokens of context the model was trained for (0 where the file does not say)."""
        return int(self._of_architecture("context_length") or 0)

    @property
    def pooling(self) -> str | None:
        """How its tokens become one vector, of a model that is made for that (a value of `POOLINGS`)."""
        return POOLINGS.get(self._of_architecture("pooling_type") or 0)

    @property
    def causal(self) -> bool:
        """Whether each token sees only those before it, as in all that generate text."""
        return self._of_architecture("attention.causal") is not False

    @property
    def vocabulary(self) -> int:
        """Tokens it knows."""
        count = self.metadata.get("tokenizer.ggml.tokens")
        return count if isinstance(count, int) else 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache one token takes in 16-bit floats (an upper bound for models with windowed layers)."""
        layers = int(self._of_architecture("block_count") or 0)
        heads = int(self._of_architecture("attention.head_count") or 0)
        kv_heads = int(self._of_architecture("attention.head_count_kv") or heads)
        width = int(self._of_architecture("embedding_length") or 0) // max(1, heads)
        key = int(self._of_architecture("attention.key_length") or width)
        value = int(self._of_architecture("attention.value_length") or width)
        return 2 * layers * kv_heads * (key + value)

    def _of_architecture(self, key: str) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int) else None


def read_gguf(path: Path) -> GGUF:
    """Read and check the head of `path`.

    Raises BadSetting for a file that is missing, not GGUF, of another version, cut short, or whose tensors lie outside
    of it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 24 or file.read(4) != _MAGIC:
                raise BadSetting(f"{path} is not a GGUF file (it does not begin with 'GGUF'): give a llama.cpp model")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).read()
    except FileNotFoundError:
        raise BadSetting(f"there is no model file {path}: set PERLLM_MODEL to a GGUF file") from None
    except OSError as error:
        raise BadSetting(f"cannot read the model file {path}: {error.strerror or error}") from None
    except (struct.error, _CutShort):
        raise BadSetting(f"{path} is cut short: it ends inside its header; download it again") from None
    except (_Malformed, UnicodeDecodeError) as error:
        raise BadSetting(f"{path} is a damaged GGUF file ({error}); download it again") from None


class _CutShort(Exception):
    pass


class _Malformed(Exception):
    pass


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, 4

    def read(self) -> GGUF:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise BadSetting(
                f"{self._path} is GGUF version {version}; versions 2 and 3 are understood: convert it anew"
            )
        tensors, keys = self._scalar("<Q"), self._scalar("<Q")
        metadata = {}
        for _ in range(keys):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        extents = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _Malformed(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        need = start + max((end for end in extents), default=0)
        if need > self._size:
            raise BadSetting(
                f"{self._path} is cut short: its tensors need {need:,} bytes, it has {self._size:,}; download it again"
            )
        if "general.architecture" not in metadata:
            raise _Malformed("general.architecture is missing")
        return GGUF(self._path, self._size, metadata, tensors)

    def _scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return value

    def _skip(self, count: int) -> int:
        at = self._at
        if count > self._size - at:
            raise _CutShort
        self._at = at + count
        return at

    def _string(self) -> str:
        length = self._scalar("<Q")
        at = self._skip(length)
        return self._data[at : at + length].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _Malformed(f"unknown value type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> int:
        """Skips an array and returns its length."""
        kind, length = self._scalar("<I"), int(self._scalar("<Q"))
        if kind == _STRING:
            if length * 8 > self._size:
                raise _CutShort
            for _ in range(length):
                self._skip(self._scalar("<Q"))
        elif kind in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise _Malformed(f"an array of value type {kind}")
        return length

    def _tensor(self) -> int:
        """One tensor's end, bytes from the start of the data."""
        name, dims = self._string(), self._scalar("<I")
        if dims > _MAX_DIMS:
            raise _Malformed(f"tensor {name!r} has {dims} dimensions")
        values = 1
        for _ in range(dims):
            values *= self._scalar("<Q")
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        if kind not in _BLOCKS:
            return int(offset)  # a newer type than this table: llama.cpp judges
        per_block, block = _BLOCKS[kind]
        return int(offset + -(-values // per_block) * block)
