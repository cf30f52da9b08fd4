"""The edge engine: llama.cpp with continuous batching, behind the worker's `Engine` contract.

`generate` renders the prompt in its caller's thread, puts a request in line and waits; one decode thread owns the
context and steps it while there is work.

With a seed and nothing else in the batch, or at temperature 0 alone in the batch, the same request gives the same
tokens every time. In company it may not: llama.cpp's kernels round differently at different widths, so a near tie
between two tokens can fall the other way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty

import structlog

from broker.errors import BadSetting
from broker.messages import Counters, Energy, ModelOffer, Output, Power, TaskSpec
from broker.settings import Settings
from broker.worker.cores import ThreadClaim, available_cores, available_memory
from broker.worker.energy import Attribution, Meter
from broker.worker.engine import EngineError, Generation, OnText, Stop
from edge_worker.batch import Batch, Gauges, Request
from edge_worker.calibrate import calibrate
from edge_worker.gguf import GGUF, read_gguf
from edge_worker.llama import MAX_SEQUENCES, VERSION, Context, LlamaError, Model
from edge_worker.meters import make_meter
from edge_worker.models import DEFAULT_QUANTISATION, default_gguf, quantised, variant_name
from edge_worker.sampling import Prompter, greedy, make_sampler
from edge_worker.text import TextStream
from edge_worker.trial import try_model

log = structlog.get_logger(__name__)

#: Requests decoded together unless set: on a CPU more of them add little speed and slow each other.
DEFAULT_SLOTS = 8
#: Tokens of context a request may have unless set (less where the model was trained for less).
DEFAULT_CONTEXT = 4096
#: KV cache per slot that is aimed for, tokens: requests rarely use their whole context.
KV_PER_SLOT = 1024
#: Ended requests' prompts kept for reuse.
REMEMBERED = 8
#: Most tokens of one llama_decode.
BATCH = 512
#: Part of the free memory one model may take.
MEMORY_PART = 0.9
#: How often a waiting caller looks whether its task was stopped, s: only to end a step early, so not often.
LOOK = 0.05


class LlamaEngine:
    """See the module's head. Thread-safe after `start`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.slots = min(settings.slots or DEFAULT_SLOTS, MAX_SEQUENCES - REMEMBERED)
        self.description = f"llama.cpp {VERSION}, not started"
        self._claim = ThreadClaim()
        self._gauges = Gauges()
        self._changed = threading.Condition()
        self._closing = False
        self._requests: dict[Request, None] = {}
        self._thread: threading.Thread | None = None
        self._model: Model
        self._meter: Meter
        self._energy: Attribution
        self._batch: Batch

    # --- life

    def start(self) -> None:
        """Load and calibrate the model. Raises BadSetting with what to change."""
        gguf = self._find()
        self._name = self._settings.model_name or variant_name(gguf)
        threads = self._threads()
        self._claim.take(threads)
        try:
            self._load(gguf, threads)
        except BaseException:
            self._claim.release()
            raise
        plural = "" if threads == 1 else "s"
        self.description = f"llama.cpp {VERSION}, {self._name}, {threads} thread{plural}"
        self._thread = threading.Thread(target=self._run, name="perllm-decode", daemon=True)
        self._thread.start()

    def _find(self) -> GGUF:
        if self._settings.model is not None:
            return read_gguf(Path(self._settings.model).expanduser())
        return read_gguf(quantised(default_gguf(), DEFAULT_QUANTISATION, self._settings.model_cache))

    def _threads(self) -> int:
        cores, others = available_cores(), self._claim.others()
        threads = self._settings.threads or max(1, cores - 1 - others)
        if threads + others > cores:
            log.warning(
                "cores_oversubscribed",
                cores=cores,
                threads=threads,
                other_engines_threads=others,
                hint="llama.cpp's threads spin: lower PERLLM_THREADS or run fewer engines here",
            )
        return threads

    def _load(self, gguf: GGUF, threads: int) -> None:
        path = gguf.path
        self._context_size = self._settings.context or min(DEFAULT_CONTEXT, gguf.context or DEFAULT_CONTEXT)
        if gguf.context and self._context_size > gguf.context:
            raise BadSetting(
                f"PERLLM_CONTEXT is {self._context_size}, but {path} was trained for {gguf.context} tokens: lower it"
            )
        kv_tokens = self._kv_tokens(gguf)
        if self._settings.model is not None:
            try_model(path)
        began = time.monotonic()
        try:
            self._model = Model(path)
        except LlamaError as error:
            raise BadSetting(f"llama.cpp cannot load {path}: {error}") from None
        try:
            if not self._model.generates:
                raise BadSetting(f"{path} ({gguf.architecture}) is not a text generation model")
            self._prompter = Prompter(self._model)
            remembered = REMEMBERED if self._model.shares_prefixes else 0
            context = Context(
                self._model, kv_tokens=kv_tokens, sequences=self.slots + remembered, batch=BATCH, threads=threads
            )
            pace = calibrate(context, slots=self.slots, token=max(0, self._model.eos))
        except LlamaError as error:
            self._model.close()
            raise BadSetting(f"llama.cpp cannot run {path} with {kv_tokens} tokens of KV cache: {error}") from None
        except BaseException:
            self._model.close()
            raise
        self._meter = make_meter(self._settings, threads)
        self._energy = Attribution(self._meter)
        self._batch = Batch(
            self._model,
            context,
            pace,
            slots=self.slots,
            remembered=remembered,
            gauges=self._gauges,
            energy=self._energy,
            counters=self.counters,
        )
        speed = pace.calibration
        log.info(
            "model_loaded",
            model=self._name,
            seconds=round(time.monotonic() - began, 2),
            threads=threads,
            kv_tokens=context.kv_tokens,
            chunk=pace.chunk,
            decode_ms=round(1e3 * (speed.step + speed.sequence), 2),
            prefill_tokens_per_s=round(1 / speed.prefill),
        )

    def _kv_tokens(self, gguf: GGUF) -> int:
        """KV cache to allocate, tokens: one whole context at least, and what a full batch usually needs."""
        wanted = max(self._context_size, self.slots * min(self._context_size, KV_PER_SLOT))
        free = int(available_memory() * MEMORY_PART) - gguf.size
        per_token = gguf.kv_bytes_per_token
        possible = free // per_token if per_token else wanted
        if possible < self._context_size:
            raise BadSetting(
                f"{gguf.path} needs {gguf.size / 1e9:.1f} GB and {self._context_size * per_token / 1e9:.1f} GB for a "
                f"context of {self._context_size} tokens; {available_memory() / 1e9:.1f} GB of memory are free: "
                "choose a smaller model or quantisation, or lower PERLLM_CONTEXT"
            )
        return min(wanted, possible)

    def close(self) -> None:
        """Stop every generation and free the model. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._batch.context.close()
            self._model.close()
        self._claim.release()

    # --- what the worker asks

    def offers(self) -> tuple[ModelOffer, ...]:
        """The models served, each with its calibration."""
        return (
            ModelOffer(
                name=self._name,
                context=self._context_size,
                kv_tokens=self._batch.context.kv_tokens,
                calibration=self._batch.pace.calibration,
            ),
        )

    def power(self) -> Power:
        """The node's power as far as known beforehand."""
        meter = self._meter
        return Power(
            idle=meter.idle,
            active=meter.active,
            joules_per_byte=self._settings.joules_per_byte,
            method=meter.method,
            estimated=meter.estimated,
        )

    def counters(self) -> Counters:
        """Totals since `start` and the present state."""
        now, gauges, batch = time.monotonic(), self._gauges, self._batch
        return Counters(
            steps=gauges.steps,
            busy=gauges.busy,
            generated=gauges.generated,
            prefilled=gauges.prefilled,
            sequence_steps=gauges.sequence_steps,
            context_steps=gauges.context_steps,
            active=len(batch.active),
            waiting=len(batch.waiting),
            free_kv=batch.free_kv,
            since_progress=max(0.0, now - gauges.progress) if batch.busy else 0.0,
            longest_step=gauges.longest_step(now),
            energy=self._meter.read(),
        )

    def progress(self) -> Mapping[str, int]:
        """Task id → tokens generated so far, of every task inside."""
        with self._changed:
            return {request.task_id: request.generated for request in self._requests}

    # --- generating

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_text: OnText | None = None) -> Generation:
        """Run one task to its end or until `stop`. Raises EngineError."""
        request = self._request(task_id, spec, stop, streams=on_text is not None)
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closing", retry=True)
            if not self._batch.busy:
                self._gauges.progress = time.monotonic()
            self._requests[request] = None
            self._batch.waiting.append(request)
            self._changed.notify_all()
        try:
            self._wait(request, on_text)
        finally:
            with self._changed:
                del self._requests[request]
        return self._generation(request)

    def _request(self, task_id: str, spec: TaskSpec, stop: Stop, *, streams: bool) -> Request:
        if spec.model is not None and spec.model != self._name:
            raise EngineError(f"model: {spec.model!r} is not served here, only {self._name!r}", retry=False)
        accepted = time.monotonic()
        tokens = self._prompter.tokens(spec)
        if not tokens:
            raise EngineError("prompt: has no tokens", retry=False)
        if len(tokens) + spec.max_tokens > self._context_size:
            room = self._context_size - len(tokens)
            way_out = f"lower max_tokens to {room}" if room > 0 else "shorten the prompt"
            raise EngineError(
                f"prompt of {len(tokens)} tokens and max_tokens {spec.max_tokens} exceed the context of "
                f"{self._context_size} tokens: {way_out}",
                retry=False,
            )
        sampler = None if greedy(spec) else make_sampler(self._model, spec, self._context_size)
        text = TextStream(spec.stop)
        return Request(task_id, spec, stop, tokens, sampler, text, accepted, streams)

    def _wait(self, request: Request, on_text: OnText | None) -> None:
        """Until the decode thread is done with the request. Passes text on, and stops it if that fails."""
        failure: BaseException | None = None
        while True:
            remaining = request.stop.remaining
            try:
                piece = request.outbox.get(timeout=LOOK if remaining is None else min(LOOK, remaining + 0.001))
            except Empty:
                if request.stop.reason:
                    self._batch.interrupt()
                continue
            if piece is None:
                break
            if on_text is not None and failure is None:
                try:
                    on_text(piece)
                except BaseException as error:
                    failure = error
                    request.stop.ask()
        if failure is not None:
            raise failure

    def _generation(self, request: Request) -> Generation:
        if request.error is not None:
            raise request.error
        assert request.finish is not None
        assert request.after is not None
        text, generated = request.text.text, request.generated
        logprobs = None
        if request.spec.logprobs is not None:
            logprobs = [entry for begins, entry in request.logprobs if begins < len(text)]
        began = request.began or time.monotonic()
        first = request.first or request.last or time.monotonic()
        return Generation(
            output=Output(text=text, finish_reason=request.finish, logprobs=logprobs),
            model=self._name,
            prompt_tokens=request.prompt_tokens,
            completion_tokens=generated,
            wait=began - request.accepted,
            prefill=max(0.0, first - began) if request.began else 0.0,
            decode=(request.last - first) if request.last else 0.0,
            energy=Energy(
                inference=request.inference,
                idle=request.idle,
                method=self._meter.method,
                estimated=self._meter.estimated,
            ),
            before=request.before or request.after,
            after=request.after,
            cached_tokens=request.cached,
            stalled=request.stalled,
        )

    # --- the decode thread

    def _run(self) -> None:
        batch, changed = self._batch, self._changed
        while True:
            with changed:
                changed.wait_for(lambda: batch.busy or self._closing)
                if self._closing:
                    break
            try:
                batch.step()
            except Exception as error:  # the engine must outlive whatever happens to a batch
                log.exception("step_failed")
                batch.fail(EngineError(f"the engine failed: {type(error).__name__}: {error}", retry=True))
        batch.fail(EngineError("the engine is closing", retry=True))
