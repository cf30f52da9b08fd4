"""llama.cpp's low-level API, typed: a model, a context holding many sequences, samplers. No policy here.

A C++ exception or failed assertion inside llama.cpp ends the process, so callers check first what llama.cpp would not.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
import structlog
from llama_cpp import __version__
from llguidance import LLTokenizer

from perllm.edge_worker.gguf import POOLINGS

log = structlog.get_logger(__name__)

_POOLINGS = {name: number for number, name in POOLINGS.items()}
#: Of llama-cpp-python, which pins its llama.cpp.
VERSION: str = __version__
#: `llama_decode` results (llama.h); below −1 the error is fatal.
OK, NO_KV_SLOT, ABORTED = 0, 1, 2
#: Sequences one context can hold (LLAMA_MAX_SEQ in llama-cparams.h).
MAX_SEQUENCES = 256
_INFO, _WARN, _ERROR = 2, 3, 4  # enum ggml_log_level in ggml.h

Logits = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float32]
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data

_ready = threading.Lock()
_errors: deque[str] = deque(maxlen=8)


def _on_log(level: int, text: bytes, _: Any) -> None:
    if level not in (_INFO, _WARN, _ERROR):
        return
    line = text.decode(errors="replace").strip()
    if level == _ERROR:
        _errors.append(line)
    log.debug("llama_cpp", line=line)


_log_callback = lib.llama_log_callback(_on_log)  # kept: llama.cpp holds only the pointer
_backend_up = False


def prepare() -> None:
    """Initialise llama.cpp once per process and turn its own printing into log events at debug level."""
    global _backend_up  # noqa: PLW0603
    with _ready:
        if not _backend_up:
            lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
            lib.llama_backend_init()
            _backend_up = True


def last_error() -> str:
    """What llama.cpp logged as an error since last asked: its first line, which is the cause."""
    text = _errors[0] if _errors else ""
    _errors.clear()
    return re.sub(r"^(?:\w+: |error loading model(?: hyperparameters)?: )+", "", text)


class LlamaError(Exception):
    """llama.cpp refused something; the message is its own."""


class Model:
    """A loaded GGUF: weights, vocabulary, chat template. Tokenising is thread-safe."""

    def __init__(self, path: Path) -> None:
        """Raises LlamaError when llama.cpp does not take the file."""
        prepare()
        last_error()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise LlamaError(last_error() or "unknown reason")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = lib.llama_vocab_n_tokens(self._vocab)
        self.adds_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        self.bos: int = lib.llama_vocab_bos(self._vocab)
        self.eos: int = lib.llama_vocab_eos(self._vocab)
        # Control tokens before a text, between two, and after the last
        sep = [lib.llama_vocab_sep(self._vocab)] if lib.llama_vocab_get_add_sep(self._vocab) else []
        eos = [self.eos] if lib.llama_vocab_get_add_eos(self._vocab) else []
        self.opening = [self.bos] if self.adds_bos else []
        self.separator, self.closing = [*eos, *sep], eos or sep
        self._pieces: dict[int, bytes] = {}
        self._vocabulary: LLTokenizer | None = None
        self._making = threading.Lock()
        # Scratch of the samplers, so of the decode thread
        self.ids = np.arange(self.vocab_size, dtype=np.int32)
        self.candidates = np.zeros(self.vocab_size, _CANDIDATE)

    @property
    def handle(self) -> Any:
        return self._model

    @property
    def vocab(self) -> Any:
        return self._vocab

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return int(lib.llama_model_size(self._model))

    @property
    def shares_prefixes(self) -> bool:
        """Whether part of a sequence's memory can be copied: not so for recurrent and windowed models."""
        return not (
            lib.llama_model_is_recurrent(self._model)
            or lib.llama_model_is_hybrid(self._model)
            or lib.llama_model_n_swa(self._model)
        )

    @property
    def generates(self) -> bool:
        """Whether this is a text generator (not an encoder or a diffusion model)."""
        return bool(
            lib.llama_model_has_decoder(self._model)
            and not lib.llama_model_has_encoder(self._model)
            and not lib.llama_model_is_diffusion(self._model)
        )

    @property
    def infills(self) -> bool:
        """Whether the vocabulary has tokens that mark what comes before and after a gap."""
        return bool(lib.llama_vocab_fim_pre(self._vocab) >= 0 and lib.llama_vocab_fim_suf(self._vocab) >= 0)

    @property
    def classes(self) -> int:
        """Outputs of its classifier; 1 also where there is none."""
        return int(lib.llama_model_n_cls_out(self._model))

    def chat_template(self, name: str | None = None) -> str | None:
        """The Jinja template in the GGUF, or the one of this name."""
        raw = lib.llama_model_chat_template(self._model, name.encode() if name is not None else None)
        return raw.decode() if raw else None

    @property
    def width(self) -> int:
        """Numbers in the vectors it makes of its tokens."""
        return int(lib.llama_model_n_embd_out(self._model))

    def token_text(self, token: int) -> str:
        """A token as the vocabulary spells it (`<|im_end|>`); empty for −1, which means there is none."""
        return lib.llama_vocab_get_text(self._vocab, token).decode(errors="replace") if token >= 0 else ""

    def tokenize(self, text: str, *, special: bool, add_bos: bool) -> list[int]:
        """Token ids of `text`; `special` reads control tokens such as `<|im_start|>` as such."""
        raw = text.encode()
        room = len(raw) + 8
        while True:
            out = (lib.llama_token * room)()
            count = lib.llama_tokenize(self._vocab, raw, len(raw), out, room, add_bos, special)
            if count >= 0:
                return list(out[:count])
            room = -count

    def tokenize_gap(self, before: str, after: str) -> list[int] | None:
        """Token ids that ask for what comes between two texts; None for a model that was not taught to fill in."""
        pre, suf, mid = (
            get(self._vocab) for get in (lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)
        )
        if pre < 0 or suf < 0:
            return None
        texts = [self.tokenize(text, special=False, add_bos=False) for text in (before, after)]
        tokens = [pre, *texts[0], suf, *texts[1], *([mid] if mid >= 0 else [])]
        return [self.bos, *tokens] if self.adds_bos else tokens

    def ends(self, token: int) -> bool:
        """Whether `token` ends a generation."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> bytes:
        """The bytes `token` stands for, empty for control tokens; maybe part of a UTF-8 character."""
        piece = self._pieces.get(token)
        if piece is None:
            room = 64
            while True:
                out = ctypes.create_string_buffer(room)
                count = lib.llama_token_to_piece(self._vocab, token, out, room, 0, False)
                if count >= 0:
                    piece = out.raw[:count]
                    break
                room = -count
            self._pieces[token] = piece
        return piece

    @property
    def vocabulary(self) -> LLTokenizer:
        """The tokens as grammars see them; made when first asked for (0.3 s). Thread-safe."""
        with self._making:
            if self._vocabulary is None:
                vocabulary = _Vocabulary(self)
                self._vocabulary = LLTokenizer(vocabulary, eos_token=vocabulary.ends or None)  # type: ignore[arg-type]
            return self._vocabulary

    def close(self) -> None:
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


class _Vocabulary:
    """What llguidance asks of a tokenizer (its TokenizerWrapper). Nothing is ever to be tokenised: that is done only
    for what a grammar forces, and ours force nothing."""

    is_tokenizer_wrapper = True

    def __init__(self, model: Model) -> None:
        tokens = range(model.vocab_size)
        self.special_token_ids = [token for token in tokens if not model.piece(token)]
        # control tokens are told apart by their names, and are never matched by text that spells one
        self.tokens = [model.piece(token) or model.token_text(token).encode() for token in tokens]
        self.bos_token_id = model.bos if model.bos >= 0 else None
        self.ends: list[int] = [token for token in tokens if model.ends(token)]
        self.eos_token_id = model.eos if model.eos >= 0 else None

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError


class _Flag:
    """A flag C code reads without the interpreter: llama.cpp asks before every graph node whether to abort, hundreds of
    times a step, and a Python callback would take the interpreter lock each time. `strlen` of a buffer is 0 or 1."""

    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        assert strlen is not None
        self.callback = lib.ggml_abort_callback(strlen)
        self.address = ctypes.cast(self._bytes, ctypes.c_void_p)

    def set(self, up: bool) -> None:
        self._bytes[0] = b"\x01" if up else b"\x00"


class Context:
    """The KV cache of one model and the means to step it. One thread only, but for `abort`."""

    def __init__(
        self, model: Model, *, kv_tokens: int, sequences: int, batch: int, threads: int, pooling: str | None = None
    ) -> None:
        """`batch` is the most tokens one `decode` takes. With `pooling` (a value of `POOLINGS`) it gives a vector for
        each sequence instead of logits; all of a sequence must be in one batch then. Raises LlamaError (most likely out
        of memory)."""
        params = lib.llama_context_default_params()
        params.n_ctx = kv_tokens
        params.n_batch = params.n_ubatch = batch  # one compute pass per decode: an abort leaves nothing half done
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True  # sequences share one cache, and prefixes in it without copying
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.no_perf = True
        self._pooled = pooling is not None
        if pooling is not None:
            params.embeddings = True
            params.pooling_type = _POOLINGS[pooling]
        self._abort = _Flag()
        params.abort_callback = self._abort.callback
        params.abort_callback_data = self._abort.address
        last_error()
        self._context = lib.llama_init_from_model(model.handle, params)
        if not self._context:
            raise LlamaError(last_error() or "no memory for the context")
        self._memory = lib.llama_get_memory(self._context)
        self._vocab_size = model.vocab_size
        self._width = model.classes if pooling == "rank" else model.width
        self.batch_tokens = batch
        self.kv_tokens: int = lib.llama_n_ctx(self._context)
        self._tokens = np.zeros(batch, np.int32)
        self._positions = np.zeros(batch, np.int32)
        self._outputs = np.zeros(batch, np.int8)
        self._counts = np.ones(batch, np.int32)
        self._sequences = np.zeros(batch, np.int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        start = self._sequences.ctypes.data
        rows = [ctypes.cast(start + 4 * i, pointer) for i in range(batch)]
        self._rows = (pointer * batch)(*rows)
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(pointer),
            pos=self._positions.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=self._rows,
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._filled = 0

    def begin(self) -> None:
        """Start filling the next batch."""
        self._filled = 0

    def add(self, sequence: int, position: int, tokens: Sequence[int], *, output: bool, every: bool = False) -> int:
        """Add `tokens` of a sequence from `position` on; `output` asks for the last one's logits, `every` for those of
        each. Returns the row of the last."""
        start, end = self._filled, self._filled + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + len(tokens), dtype=np.int32)
        self._sequences[start:end] = sequence
        self._outputs[start:end] = every or self._pooled
        self._outputs[end - 1] = output or every
        self._filled = end
        return end - 1

    def decode(self) -> int:
        """Run the batch. Returns OK, NO_KV_SLOT, ABORTED, or a negative number."""
        self._batch.n_tokens = self._filled
        return int(lib.llama_decode(self._context, self._batch))

    def logits(self, row: int) -> Logits:
        """The logits of a row added with `output`, shape (vocab_size,). A view: gone with the next decode."""
        pointer = lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))

    def vector(self, sequence: int) -> Vector:
        """The pooled vector of a sequence of the last batch, shape (width,). A view: gone with the next decode. Raises
        LlamaError where there is none."""
        pointer = lib.llama_get_embeddings_seq(self._context, sequence)
        if not pointer:
            raise LlamaError("llama.cpp gave no vector for a sequence")
        return np.ctypeslib.as_array(pointer, (self._width,))

    def abort(self, now: bool) -> None:
        """Make the running decode (and any later one) end with ABORTED, until set to False. From any thread."""
        self._abort.set(now)

    def remove(self, sequence: int, start: int = 0) -> None:
        """Forget a sequence's tokens from position `start` on."""
        lib.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def copy(self, source: int, target: int, end: int) -> None:
        """Let `target` share the first `end` tokens of `source`."""
        lib.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def clear(self) -> None:
        """Forget everything."""
        lib.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        if self._context:
            lib.llama_free(self._context)
            self._context = None


class SamplerChain:
    """Chooses tokens from logits, some of them biased, by a chain of llama.cpp's samplers."""

    def __init__(self, model: Model, chain: Sequence[Callable[[], Any]], bias: Mapping[int, float]) -> None:
        """`chain` makes the samplers in order, the last one choosing. `bias` is added to the logits of these tokens:
        here, since llama.cpp's own sampler looks for each among all that a grammar allows."""
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for make in chain:
            lib.llama_sampler_chain_add(self._chain, make())
        self._model = model
        self._biased = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))

    def choose(self, logits: Logits, among: npt.NDArray[np.intp] | None = None) -> int:
        """The next token, one of `among` (ids, at least one) if given. Choosing commits to nothing: see `accept`."""
        if len(self._bias):
            logits = logits.copy()
            logits[self._biased] += self._bias
        count = len(logits) if among is None else len(among)
        candidates = self._model.candidates[:count]
        candidates["id"] = self._model.ids if among is None else among
        candidates["logit"] = logits if among is None else logits[among]
        array = lib.llama_token_data_array(
            data=candidates.ctypes.data_as(lib.llama_token_data_p), size=count, selected=-1, sorted=False
        )
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def accept(self, token: int) -> None:
        """The token was generated: penalties count it."""
        lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None

    def __del__(self) -> None:
        self.close()
