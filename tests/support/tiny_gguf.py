"""A GGUF writer for tests: a llama of two small layers with random weights and the real SmolLM2 vocabulary.

It talks nonsense, but through all of llama.cpp, at a fraction of a millisecond per token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perllm.edge_worker.model_files import default_gguf

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
ALIGNMENT = 32


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: Any) -> bytes:
    """One metadata entry."""
    formats = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}
    raw = text(value) if kind == STRING else struct.pack(formats[kind], value)
    return text(key) + struct.pack("<I", kind) + raw


def write(path: Path, pairs: Iterable[bytes], tensors: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """A GGUF file of 32-bit float tensors."""
    pairs = list(pairs)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    offset, infos, data = 0, b"", b""
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]  # GGUF's first dimension is the contiguous one
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        raw = tensor.astype("<f4").tobytes()
        raw += b"\0" * (-len(raw) % ALIGNMENT)
        data += raw
        offset += len(raw)
    head += infos
    path.write_bytes(head + b"\0" * (-len(head) % ALIGNMENT) + data)
    return path


def vocabulary() -> list[bytes]:
    """The tokenizer's metadata entries of the default model, as they are in its file."""
    raw = default_gguf().read_bytes()[:8_000_000]
    entries = []
    keys = [
        "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.add_bos_token", "tokenizer.chat_template",
    ]  # fmt: skip
    for key in keys:
        start = raw.index(text(key))
        entries.append(raw[start : _end(raw, start + len(text(key)))])
    return entries


def _end(raw: bytes, at: int) -> int:
    """Where the value whose type stands at `at` ends."""
    sizes = {U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8}
    (kind,) = struct.unpack_from("<I", raw, at)
    at += 4
    if kind == STRING:
        return at + 8 + int(struct.unpack_from("<Q", raw, at)[0])
    if kind != ARRAY:
        return at + sizes[kind]
    kind, length = struct.unpack_from("<IQ", raw, at)
    at += 12
    if kind != STRING:
        return at + sizes[kind] * int(length)
    for _ in range(length):
        at += 8 + int(struct.unpack_from("<Q", raw, at)[0])
    return at


def _renamed(entry: bytes, names: Mapping[str, str]) -> bytes:
    for old, new in names.items():
        entry = entry.replace(text(old), text(new))
    return entry


def tiny_llama(
    path: Path,
    *,
    architecture: str = "llama",
    context: int = 2048,
    template: str | None = None,
    tokens: Mapping[str, str] | None = None,
    **changes: int,
) -> Path:
    """Write the tiny model. `changes` replace numbers in its metadata, e.g. `head_count=0`; `template` is its chat
    template; `tokens` gives control tokens other names."""
    width, hidden, layers, heads, vocab = 32, 64, 2, 2, 49152
    numbers = {
        "context_length": context, "embedding_length": width, "block_count": layers, "feed_forward_length": hidden,
        "attention.head_count": heads, "attention.head_count_kv": heads, "rope.dimension_count": width // heads,
        "vocab_size": vocab,
    }  # fmt: skip
    numbers |= {key.replace("attention_", "attention."): value for key, value in changes.items()}
    pairs = [
        pair("general.architecture", STRING, architecture),
        pair("general.file_type", U32, 0),
        *(pair(f"{architecture}.{key}", U32, value) for key, value in numbers.items()),
        pair(f"{architecture}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        *(_renamed(entry, tokens or {}) for entry in vocabulary()[: None if template is None else -1]),
        *([] if template is None else [pair("tokenizer.chat_template", STRING, template)]),
    ]
    rng = np.random.default_rng(7)

    def weights(*shape: int) -> np.ndarray[Any, Any]:
        return rng.normal(0, 1 / np.sqrt(shape[-1]), shape).astype(np.float32)

    tensors = {"token_embd.weight": weights(vocab, width), "output_norm.weight": np.ones(width, np.float32)}
    for layer in range(layers):
        block = f"blk.{layer}"
        tensors |= {
            f"{block}.attn_norm.weight": np.ones(width, np.float32),
            f"{block}.ffn_norm.weight": np.ones(width, np.float32),
            f"{block}.attn_q.weight": weights(width, width),
            f"{block}.attn_k.weight": weights(width, width),
            f"{block}.attn_v.weight": weights(width, width),
            f"{block}.attn_output.weight": weights(width, width),
            f"{block}.ffn_gate.weight": weights(hidden, width),
            f"{block}.ffn_up.weight": weights(hidden, width),
            f"{block}.ffn_down.weight": weights(width, hidden),
        }
    return write(path, pairs, tensors)
