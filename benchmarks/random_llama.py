"""Llama models with random weights, made up by vLLM itself (`load_format="dummy"`): real speed and energy, no sense.

The tokenizer gives one token per byte of a prompt, and any token the model draws has a text.
"""

from __future__ import annotations

import json
from pathlib import Path

#: hidden size, intermediate size, layers, attention heads, KV heads, vocabulary
SIZES = {
    "tiny": (128, 256, 2, 4, 2, 1024),
    "8b": (4096, 14336, 32, 32, 8, 128_256),  # Llama 3 8B
    "33b": (6656, 17_920, 60, 52, 52, 32_000),  # LLaMA 33B
}


def write_model(folder: Path, size: str, context: int = 4096) -> Path:
    """A Hugging Face folder without weights. Needs the `tokenizers` package, which comes with vLLM."""
    from tokenizers import (  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
    )

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # no end-of-text token: every output is as long as it was asked for
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{number}" for number in range(vocabulary - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet + words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    return folder
