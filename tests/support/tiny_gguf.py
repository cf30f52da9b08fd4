"""A GGUF writer for tests: models of two small layers with random weights. A llama with the real SmolLM2 vocabulary,
and a BERT that embeds or reranks.

What they say is nonsense, but through all of llama.cpp, at a fraction of a millisecond per token.
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


def array(key: str, kind: int, values: Iterable[Any]) -> bytes:
    """One metadata entry: a list of strings or of signed numbers."""
    values = list(values)
    raw = b"".join(text(v) if kind == STRING else struct.pack("<i", v) for v in values)
    return text(key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + raw


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
    more: Iterable[bytes] = (),
    **changes: int,
) -> Path:
    """Write the tiny model. `changes` replace numbers in its metadata, e.g. `head_count=0`; `template` is its chat
    template; `tokens` gives control tokens other names; `more` are entries."""
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
        *more,
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


#: Pooling types as GGUF numbers them.
MEAN, CLS, LAST, RANK = 1, 2, 3, 4
_CONTROL, _NORMAL = 3, 1


def _wordpieces() -> tuple[list[str], list[int]]:
    """A BERT vocabulary that spells any lower-case ASCII word: tokens and their types."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,:?!-"
    pieces = [f"\u2581{c}" for c in characters] + list(characters) + ["\u2581the", "\u2581word", "\u2581sky"]
    return special + pieces, [_CONTROL] * len(special) + [_NORMAL] * len(pieces)


def tiny_bert(path: Path, *, pooling: int | None = MEAN, context: int = 128, width: int = 32) -> Path:
    """Write a BERT that embeds with this pooling (None: its file does not say); with RANK, one that reranks."""
    hidden, layers, heads = 2 * width, 2, 2
    tokens, kinds = _wordpieces()
    numbers = {
        "context_length": context, "embedding_length": width, "block_count": layers, "feed_forward_length": hidden,
        "attention.head_count": heads,
    }  # fmt: skip
    if pooling is not None:
        numbers["pooling_type"] = pooling
    ids = {"unknown": 1, "padding": 0, "bos": 2, "eos": 3, "seperator": 3, "cls": 2, "mask": 1}
    pairs = [
        pair("general.architecture", STRING, "bert"),
        pair("general.file_type", U32, 0),
        *(pair(f"bert.{key}", U32, value) for key, value in numbers.items()),
        pair("bert.attention.layer_norm_epsilon", F32, 1e-12),
        pair("bert.attention.causal", BOOL, False),
        pair("tokenizer.ggml.model", STRING, "bert"),
        pair("tokenizer.ggml.token_type_count", U32, 2),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, kinds),
        *(pair(f"tokenizer.ggml.{name}_token_id", U32, value) for name, value in ids.items()),
    ]
    rng = np.random.default_rng(11)

    def weights(*shape: int) -> np.ndarray[Any, Any]:
        return rng.normal(0, 1 / np.sqrt(shape[-1]), shape).astype(np.float32)

    def layer_norm(name: str) -> dict[str, np.ndarray[Any, Any]]:
        return {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": np.zeros(width, np.float32)}

    def linear(name: str, out: int, into: int) -> dict[str, np.ndarray[Any, Any]]:
        return {f"{name}.weight": weights(out, into), f"{name}.bias": weights(out)}

    tensors = {
        "token_embd.weight": weights(len(tokens), width),
        "position_embd.weight": weights(context, width),
        "token_types.weight": weights(2, width),
        **layer_norm("token_embd_norm"),
    }
    for layer in range(layers):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors |= linear(f"{block}.{name}", width, width)
        tensors |= layer_norm(f"{block}.attn_output_norm") | layer_norm(f"{block}.layer_output_norm")
        tensors |= linear(f"{block}.ffn_up", hidden, width) | linear(f"{block}.ffn_down", width, hidden)
    if pooling == RANK:
        tensors |= linear("cls", width, width) | linear("cls.output", 1, width)
    return write(path, pairs, tensors)
