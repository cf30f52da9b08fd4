"""The models a node serves: quantisations of one GGUF, or a single file; loaded on demand, least recently used out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from perllm.broker.capabilities import OF_KIND, Capability
from perllm.broker.engine.checks import check_kind, check_model
from perllm.broker.engine.contract import EngineError, Stop
from perllm.broker.engine.cores import available_memory
from perllm.broker.engine.energy import Attribution
from perllm.broker.engine.totals import EngineTotals
from perllm.broker.errors import BadSetting
from perllm.broker.messages import Counters, ModelOffer
from perllm.edge_worker.batch import Batch, BatchTuning
from perllm.edge_worker.calibrate import BUDGET, MOST_EMBEDDED, calibrate, calibrate_embedding
from perllm.edge_worker.capabilities import look
from perllm.edge_worker.embedder import Embedder
from perllm.edge_worker.embedding_batch import STEP_INPUTS, EmbeddingBatch, EmbeddingTuning
from perllm.edge_worker.gguf import GGUF, read_gguf
from perllm.edge_worker.llama import Context, LlamaError, Model
from perllm.edge_worker.model_files import DEFAULT_QUANTISATION, default_gguf, model_name, quantised
from perllm.edge_worker.preflight import preflight
from perllm.edge_worker.sampling import Prompter
from perllm.edge_worker.settings import EdgeSettings

log = structlog.get_logger(__name__)

#: Tokens of context a request may have unless set (less where the model was trained for less).
DEFAULT_CONTEXT = 4096
#: The same of one input of a model that embeds: llama.cpp computes it in one go, and takes memory for that.
DEFAULT_INPUT = 2048
#: KV cache per slot that is aimed for, tokens: requests rarely use their whole context.
KV_PER_SLOT = 1024
#: llama.cpp rounds a KV cache up to a multiple of this, tokens.
KV_STEP = 256
#: Most tokens of one llama_decode.
BATCH = 512
#: Part of the memory free at the start that loaded models may take together, unless set.
MEMORY_PART = 0.9
#: Bytes llama.cpp computes in beside weights and KV cache (measured: 98 MB at 512 tokens per decode and 49,152 words).
SCRATCH = 128 << 20
#: Seconds between two polls whether memory for another model has come free, at most.
_MEMORY_POLL = 0.05
#: Seconds `close` waits for callers to leave.
_CLOSE_TIMEOUT = 5.0


class Stopped(Exception):
    """The request was cancelled, or its deadline passed, while it waited for its model."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, ready to step. One that embeds has no prompter, but an `embedder`."""

    model: Model
    batch: Batch | EmbeddingBatch
    prompter: Prompter | None = None
    embedder: Embedder | None = None

    def close(self) -> None:
        self.batch.context.close()
        self.model.close()


@dataclass(slots=True)
class ServedModel:
    """One model the node offers, in memory or not."""

    name: str
    gguf: GGUF
    context: int  # tokens per request
    kv_tokens: int
    pooling: str | None = None  # it embeds, its tokens' vectors pooled so; None: it generates
    tuning: BatchTuning | EmbeddingTuning | None = None  # measured when first loaded, …
    capabilities: tuple[Capability, ...] = ()  # … as these are found out, …
    width: int | None = None  # … and of the embeddings it makes, how long they are
    loaded: LoadedModel | None = None
    loading: bool = False
    users: int = 0  # requests inside: it stays loaded while there are any
    used: float = 0.0  # when it was last asked for

    @property
    def bytes(self) -> int:
        """Memory it takes when loaded, about."""
        return self.gguf.size + _kv_bytes(self.gguf, self.kv_tokens) + _scratch(self.gguf, self.pooling, self.kv_tokens)

    @property
    def offer(self) -> ModelOffer:
        assert self.tuning is not None
        return ModelOffer(
            name=self.name,
            context=self.context,
            kv_tokens=self.kv_tokens,
            chunk=self.tuning.chunk,
            calibration=self.tuning.step_cost,
            capabilities=self.capabilities,
            dimensions=self.width,
        )


class ModelPool:
    """The node's models by name; the first is the default one. Thread-safe."""

    def __init__(
        self,
        settings: EdgeSettings,
        *,
        slots: int,
        threads: int,
        cached_prompts: int,
        totals: EngineTotals,
        energy: Attribution,
        counters: Callable[[], Counters],
    ) -> None:
        """Finds the files, quantises what is missing, and plans the memory. Raises BadSetting."""
        self._slots, self._threads, self._cached_prompts = slots, threads, cached_prompts
        self._totals, self._energy, self._counters = totals, energy, counters
        self._needs_preflight = settings.model is not None  # a file not known to be good
        free = available_memory()
        self._memory = settings.model_memory or int(free * MEMORY_PART)
        self._changed = threading.Condition()
        self._all: dict[str, ServedModel] = {}
        #: Those of the models in memory.
        self.batches: tuple[Batch | EmbeddingBatch, ...] = ()
        for gguf in _files(settings):
            for pooling in _uses(gguf, settings.pooling):
                served = self._plan(settings, gguf, pooling, free)
                self._all[served.name] = served

    def start(self) -> None:
        """Load and measure each model once, the default one last so that it stays. Raises BadSetting."""
        if self._needs_preflight:
            first = next(iter(self._all.values()))
            preflight(first.gguf.path, first.pooling)
        for served in reversed(self._all.values()):
            self._make_room(served)
            self._load(served, BUDGET / len(self._all))

    def offers(self) -> tuple[ModelOffer, ...]:
        """What the node serves, the default model first."""
        return tuple(served.offer for served in self._all.values())

    @property
    def names(self) -> Sequence[str]:
        return list(self._all)

    @property
    def free_kv(self) -> int:
        """Tokens of KV cache free in the models in memory."""
        return sum(batch.free_kv for batch in self.batches)

    def get(self, name: str | None, kind: str = "generate") -> ServedModel:
        """The model of this name, or the first for this kind of task for None. Raises EngineError (retry=False)."""
        if name is None:
            able = (served.name for served in self._all.values() if OF_KIND[kind] in served.capabilities)
            name = next(able, self.names[0])
        check_model(name, self._all)
        check_kind(kind, name, self._all[name].capabilities)
        return self._all[name]

    @contextmanager
    def using(self, served: ServedModel, stop: Stop) -> Iterator[LoadedModel]:
        """The model in memory, for as long as the context lasts; loaded first if need be, in place of others that
        nobody uses. Raises Stopped when `stop` comes first, EngineError (retry=True) when it cannot be loaded."""
        loaded = self._enter(served, stop)
        try:
            yield loaded
        finally:
            with self._changed:
                served.users -= 1
                self._changed.notify_all()

    def _enter(self, served: ServedModel, stop: Stop) -> LoadedModel:
        while True:
            with self._changed:
                if served.loaded is not None:
                    served.users += 1
                    served.used = time.monotonic()
                    return served.loaded
                if stop.reason:
                    raise Stopped
                if served.loading or not self._make_room(served):
                    self._changed.wait(_MEMORY_POLL)
                    continue
                served.loading = True  # without the lock, so that requests for others go on
            try:
                self._load(served, BUDGET)
            except BadSetting as error:
                raise EngineError(str(error), retry=True) from None
            finally:
                served.loading = False

    def close(self) -> None:
        """Free all models, once their users have left. A model somebody will not leave is not freed."""
        with self._changed:
            self._changed.wait_for(lambda: not any(v.users for v in self._all.values()), timeout=_CLOSE_TIMEOUT)
            for served in self._all.values():
                if not served.users:
                    self._unload(served)

    # --- memory

    def _plan(self, settings: EdgeSettings, gguf: GGUF, pooling: str | None, free: int) -> ServedModel:
        usual = DEFAULT_CONTEXT if pooling is None else DEFAULT_INPUT
        context = settings.context or min(usual, gguf.context or usual)
        if gguf.context and context > gguf.context:
            raise BadSetting(
                f"PERLLM_CONTEXT is {context}, but {gguf.path} was trained for {gguf.context} tokens: lower it"
            )
        # One whole context at least, and what a full batch usually needs.
        wanted = max(context, self._slots * min(context, KV_PER_SLOT) if pooling is None else MOST_EMBEDDED)
        per_token = _kv_bytes(gguf, 1)
        fixed = gguf.size + _scratch(gguf, pooling, context)
        possible = (self._memory - fixed) // per_token if per_token else wanted
        if possible < context or fixed > self._memory:
            raise BadSetting(
                f"{gguf.path} needs {_gigabytes(fixed)}, and {_gigabytes(context * per_token)} for a "
                f"context of {context} tokens; {_gigabytes(self._memory)} of {_gigabytes(free)} free may be used: "
                "choose a smaller model or quantisation, or lower PERLLM_CONTEXT"
            )
        kv_tokens = -(-min(wanted, possible) // KV_STEP) * KV_STEP
        name = model_name(settings, gguf)
        beside = pooling is not None and gguf.pooling is None and gguf.causal  # the same file generates, too
        return ServedModel(f"{name}:embed" if beside else name, gguf, context, kv_tokens, pooling)

    def _make_room(self, served: ServedModel) -> bool:
        """Whether there is memory for `served`, after unloading others nobody uses, least recently used first."""
        present = sorted((v for v in self._all.values() if v.loaded or v.loading), key=lambda v: v.used)
        excess = sum(v.bytes for v in present) + served.bytes - self._memory
        idle = [v for v in present if v.loaded and not v.users]
        if excess > sum(v.bytes for v in idle):
            return False
        for other in idle:
            if excess <= 0:
                break
            self._unload(other)
            excess -= other.bytes
        return True

    def _unload(self, served: ServedModel) -> None:
        if served.loaded is not None:
            loaded, served.loaded = served.loaded, None
            self._list()
            loaded.close()
            log.info("model_unloaded", model=served.name)

    def _list(self) -> None:
        self.batches = tuple(v.loaded.batch for v in self._all.values() if v.loaded is not None)

    def _load(self, served: ServedModel, budget: float) -> None:
        began = time.monotonic()
        path = served.gguf.path
        try:
            model = Model(path)
        except LlamaError as error:
            raise BadSetting(f"llama.cpp cannot load {path}: {error}") from None
        try:
            prompter = Prompter(model) if served.pooling is None else None
            template = prompter.template if prompter is not None else None
            capabilities = look(served.gguf.metadata, model, template, served.pooling)
            ready, tuning = self._prepare(served, model, prompter, capabilities, budget)
        except LlamaError as error:
            model.close()
            raise BadSetting(f"llama.cpp cannot run {path} with {served.kv_tokens} tokens of KV: {error}") from None
        except BaseException:
            model.close()
            raise
        with self._changed:
            served.tuning, served.capabilities = tuning, capabilities
            served.width = model.width if Capability.EMBEDDINGS in capabilities else None
            served.loaded, served.used = ready, time.monotonic()
            self._list()
            self._changed.notify_all()
        cost = tuning.step_cost
        log.info(
            "model_loaded",
            model=served.name,
            seconds=round(time.monotonic() - began, 2),
            threads=self._threads,
            kv_tokens=served.kv_tokens,
            capabilities=", ".join(capabilities),
            chunk=tuning.chunk,
            decode_ms=round(1e3 * (cost.step + cost.sequence), 2) if served.pooling is None else None,
            prefill_tokens_per_s=round(1 / cost.prefill),
        )

    def _prepare(
        self,
        served: ServedModel,
        model: Model,
        prompter: Prompter | None,
        capabilities: Collection[Capability],
        budget: float,
    ) -> tuple[LoadedModel, BatchTuning | EmbeddingTuning]:
        """A context for the model, measured when it is the first. Raises BadSetting, LlamaError."""
        if served.pooling is not None:
            if not capabilities:
                raise BadSetting(f"{served.gguf.path} gives {model.classes} scores: it classifies, and does not rerank")
            return self._prepare_to_embed(served, model, served.pooling, budget)
        if Capability.GENERATE not in capabilities:
            raise BadSetting(f"{served.gguf.path} ({served.gguf.architecture}) is not a text generation model")
        cached_prompts = self._cached_prompts if model.shares_prefixes else 0
        sequences = self._slots + cached_prompts
        context = Context(model, kv_tokens=served.kv_tokens, sequences=sequences, batch=BATCH, threads=self._threads)
        tuning = served.tuning or calibrate(context, slots=self._slots, token=max(0, model.eos), budget=budget)
        assert isinstance(tuning, BatchTuning)
        batch = Batch(
            model,
            context,
            tuning,
            slots=self._slots,
            cached_prompts=cached_prompts,
            totals=self._totals.of(served.name),
            energy=self._energy,
            counters=self._counters,
        )
        return LoadedModel(model, batch, prompter=prompter), tuning

    def _prepare_to_embed(
        self, served: ServedModel, model: Model, pooling: str, budget: float
    ) -> tuple[LoadedModel, EmbeddingTuning]:
        tokens = served.kv_tokens
        context = Context(
            model, kv_tokens=tokens, sequences=STEP_INPUTS, batch=tokens, threads=self._threads, pooling=pooling
        )
        tuning = served.tuning or calibrate_embedding(
            context, longest=served.context, token=max(0, model.eos), budget=budget
        )
        assert isinstance(tuning, EmbeddingTuning)
        batch = EmbeddingBatch(
            context,
            tuning,
            slots=self._slots,
            totals=self._totals.of(served.name),
            energy=self._energy,
            counters=self._counters,
        )
        return LoadedModel(model, batch, embedder=Embedder(model, pooling, served.context)), tuning


def _files(settings: EdgeSettings) -> list[GGUF]:
    """The GGUF files the settings ask for: the given one (or the default), in the quantisations listed."""
    source = Path(settings.model).expanduser() if settings.model is not None else default_gguf()
    own = read_gguf(source)
    wanted = [part.strip().lower() for part in (settings.variants or "").split(",") if part.strip()]
    if not wanted:
        wanted = [DEFAULT_QUANTISATION if settings.model is None else own.quantisation]
    return [
        own if name == own.quantisation else read_gguf(quantised(source, name, settings.model_cache))
        for name in dict.fromkeys(wanted)
    ]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2g} GB"


def _uses(gguf: GGUF, pooling: str | None) -> list[str | None]:
    """What a file is served for: to generate (None), or to embed with a pooling: its own, or the one that is set."""
    if gguf.pooling is not None:
        return [gguf.pooling if pooling is None or gguf.pooling == "rank" else pooling]
    if gguf.causal:
        return [None] if pooling is None else [None, pooling]
    if pooling is None:
        raise BadSetting(
            f"{gguf.path} ({gguf.architecture}) does not generate text, and does not say how it embeds: set "
            "PERLLM_POOLING as its makers say (mean, cls or last)"
        )
    return [pooling]


def _kv_bytes(gguf: GGUF, tokens: int) -> int:
    """What a KV cache of so many tokens takes. A model that sees all tokens at once has none."""
    return tokens * gguf.kv_bytes_per_token if gguf.causal else 0


def _scratch(gguf: GGUF, pooling: str | None, tokens: int) -> int:
    """What llama.cpp computes in. Where it pools a generator's tokens, it works out all their logits, twice kept."""
    logits = 8 * tokens * gguf.vocabulary if pooling is not None and gguf.causal else 0
    return SCRATCH + logits
