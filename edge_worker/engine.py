"""The edge engine: llama.cpp with continuous batching, behind the worker's `Engine` contract.

`generate` renders the prompt in its caller's thread, queues a request and waits; one decode thread owns the
contexts and steps them while there is work.

With a seed and nothing else in the batch, or at temperature 0 alone in the batch, the same request gives the same
tokens every time. In company, that of its other answers too, or after a shared prefix, it may not: llama.cpp's kernels
round differently at different widths, so a near tie between two tokens can fall the other way. Answer i of a request
with seed s draws as a request for one answer with seed s + i would (`answer_seed`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from queue import Empty
from typing import Any

import structlog

from perllm.broker.engine.checks import fitted
from perllm.broker.engine.contract import EngineError, FinishReason, Generation, OnDelta, Stop, Stuck
from perllm.broker.engine.cores import ThreadClaim, available_cores
from perllm.broker.engine.embedding import made_of
from perllm.broker.engine.energy import Attribution, Meter, power_of
from perllm.broker.engine.text import DeltaSink, Prompt
from perllm.broker.engine.totals import EngineTotals
from perllm.broker.messages import Choice, Counters, Delta, Energy, ModelOffer, Output, Power, TaskSpec
from perllm.edge_worker.batch import Answer, Batch, Request
from perllm.edge_worker.embedding_batch import EmbeddingBatch, EmbeddingRequest
from perllm.edge_worker.llama import MAX_SEQUENCES, VERSION
from perllm.edge_worker.meters import make_meter
from perllm.edge_worker.model_pool import LoadedModel, ModelPool, ServedModel, Stopped
from perllm.edge_worker.sampling import Sampler, make_samplers
from perllm.edge_worker.settings import EdgeSettings
from perllm.edge_worker.text_stream import TextStream

log = structlog.get_logger(__name__)

AnyBatch = Batch | EmbeddingBatch

#: Requests decoded together unless set, on a machine of fewer cores than `MANY_CORES` and of more: with few cores more
#: requests add little speed and slow each other.
SLOTS, SLOTS_OF_MANY, MANY_CORES = 8, 16, 8
#: Ended requests' prompts kept for reuse.
CACHED_PROMPTS = 8
#: A step that takes longer than this, s, and than so many times the longest expected or lately seen, will not end.
STUCK_SECONDS, STUCK_FACTOR = 10.0, 20.0
#: Seconds between a waiting caller's polls of `Stop`: only to abort a step early, so not often.
STOP_POLL = 0.05


class LlamaEngine:
    """See the module's head. Thread-safe after `start`."""

    def __init__(self, settings: EdgeSettings, *, cached_prompts: int = CACHED_PROMPTS, note: str = "") -> None:
        """`cached_prompts` 0 shares no prefixes at all. `note` is added to the description."""
        self._settings, self._cached_prompts, self._note = settings, cached_prompts, note
        by_cores = SLOTS if available_cores() < MANY_CORES else SLOTS_OF_MANY
        self.slots = min(settings.slots or by_cores, MAX_SEQUENCES - cached_prompts)
        self.description = f"llama.cpp {VERSION}, not started"
        self._claim = ThreadClaim()
        self._totals = EngineTotals()
        self._changed = threading.Condition()
        self._closing = False
        self._requests: dict[Request | EmbeddingRequest, None] = {}
        self._thread: threading.Thread | None = None
        self._meter: Meter
        self._energy: Attribution
        self._pool: ModelPool

    # --- life

    def start(self) -> None:
        """Load and calibrate the model(s). Raises BadSetting with what to change."""
        threads = self._threads()
        self._claim.take(threads)
        try:
            self._meter = make_meter(self._settings, threads)
            self._energy = Attribution(self._meter)
            self._pool = ModelPool(
                self._settings,
                slots=self.slots,
                threads=threads,
                cached_prompts=self._cached_prompts,
                totals=self._totals,
                energy=self._energy,
                counters=self.counters,
            )
            self._pool.start()
        except BaseException:
            self._claim.release()
            raise
        plural = "" if threads == 1 else "s"
        parts = (f"llama.cpp {VERSION}", *self._pool.names, f"{threads} thread{plural}", self._note)
        self.description = ", ".join(part for part in parts if part)
        self._thread = threading.Thread(target=self._run, name="perllm-decode", daemon=True)
        self._thread.start()

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

    def close(self) -> None:
        """Stop every generation and free the models. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._pool.close()
        self._claim.release()

    # --- what the worker asks

    def offers(self) -> tuple[ModelOffer, ...]:
        """The models served, each with its calibration."""
        return self._pool.offers()

    def power(self) -> Power:
        """The node's power as far as known beforehand."""
        return power_of(self._meter, self._settings.joules_per_byte)

    def counters(self) -> Counters:
        """Totals since `start` and the present state."""
        batches = self._pool.batches
        return self._totals.counters(
            active=sum(len(batch.active) for batch in batches),
            waiting=sum(len(batch.waiting) for batch in batches),
            free_kv=self._pool.free_kv,
            energy=self._meter.read(),
        )

    def progress(self) -> Mapping[str, int]:
        """Task id → tokens generated so far, of every task inside."""
        with self._changed:
            return {request.task_id: request.generated for request in self._requests}

    def stuck(self) -> Stuck | None:
        """Not None when a step takes longer than any working one could."""
        now = time.monotonic()
        busy = [batch for batch in self._pool.batches if batch.busy]
        if not busy:
            return None
        longest = max(self._totals.longest_step(now), *(batch.longest_step for batch in busy))
        silent = now - self._totals.last_progress
        if silent <= max(STUCK_SECONDS, STUCK_FACTOR * longest):
            return None
        computing = frozenset(request.task_id for batch in busy for request in batch.computing)
        return Stuck(f"the engine has not got on for {silent:.0f} s", computing)

    # --- generating

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        """Run one task to its end or until `stop`. Raises EngineError."""
        accepted = time.monotonic()
        served = self._pool.get(spec.model, spec.kind)
        if self._closing:
            raise EngineError("the engine is closing", retry=True)
        if spec.kind != "generate":
            return self._embed(task_id, spec, stop, served, accepted)
        try:
            with self._pool.using(served, stop) as loaded:
                request = self._request(task_id, spec, stop, served, loaded, accepted)
                request.streams = on_delta is not None
                if request.streams and request.echo:
                    for answer in request.answers:
                        request.outbox.put(Delta(index=answer.index, text=request.echo))
                self._enqueue(loaded.batch, request)
                try:
                    self._wait(loaded.batch, request, on_delta)
                finally:
                    with self._changed:
                        del self._requests[request]
        except Stopped:
            request = _new_request(task_id, spec, stop, Prompt([]), [None] * spec.n, accepted)
            request.after = self.counters()
            for answer in request.answers:
                answer.finish = stop.reason
        return self._generation(served, request)

    @staticmethod
    def _request(
        task_id: str, spec: TaskSpec, stop: Stop, served: ServedModel, loaded: LoadedModel, accepted: float
    ) -> Request:
        assert loaded.prompter is not None
        prompt = loaded.prompter.prompt(spec)
        spec = fitted(spec, len(prompt.tokens), served.context)
        samplers = make_samplers(loaded.model, spec, served.context, prompt)
        request = _new_request(task_id, spec, stop, prompt, samplers, accepted)
        request.echo = loaded.prompter.echo(spec)
        return request

    def _enqueue(self, batch: AnyBatch, request: Request | EmbeddingRequest) -> None:
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closing", retry=True)
            if not self._requests:
                self._totals.last_progress = time.monotonic()
            self._requests[request] = None
            # A batch is asked for its own kind.
            waiting: Any = request.answers if isinstance(request, Request) else [request]
            batch.waiting.extend(waiting)
            self._changed.notify_all()

    @staticmethod
    def _wait(batch: AnyBatch, request: Request | EmbeddingRequest, on_delta: OnDelta | None) -> None:
        """Until the decode thread is done with the request. Passes text on, and cancels it if that fails."""
        sink = DeltaSink(on_delta, request.stop) if on_delta is not None else None
        while True:
            remaining = request.stop.remaining
            try:
                timeout = STOP_POLL if remaining is None else min(STOP_POLL, remaining + 0.001)
                piece = request.outbox.get(timeout=timeout)
            except Empty:
                if request.stop.reason:
                    batch.interrupt()
                continue
            if piece is None:
                break
            if sink is not None:
                sink.push(piece)
        if sink is not None:
            sink.close()

    def _generation(self, served: ServedModel, request: Request) -> Generation:
        if request.error is not None:
            raise request.error
        assert request.after is not None
        ended = time.monotonic()
        began = request.began or ended
        first = min((a.first for a in request.answers if a.first), default=ended)
        last = max((a.last for a in request.answers if a.last), default=first)
        head, *more = [_choice(answer) for answer in request.answers]
        return Generation(
            output=Output(**head, more=tuple(Choice(**each) for each in more)),
            model=served.name,
            prompt_tokens=len(request.prompt),
            completion_tokens=request.generated,
            wait=began - request.accepted,
            prefill=first - began,
            decode=last - first,
            energy=Energy(
                inference=request.inference,
                idle=request.idle,
                method=self._meter.method,
                estimated=self._meter.estimated,
            ),
            before=request.before or request.after,
            after=request.after,
            reasoning_tokens=sum(answer.text.reasoning_tokens for answer in request.answers),
            cached_tokens=request.cached,
            stalled=request.stalled,
        )

    # --- embedding

    def _embed(self, task_id: str, spec: TaskSpec, stop: Stop, served: ServedModel, accepted: float) -> Generation:
        """Embed or rerank one task's inputs, to their end or until `stop`. Raises EngineError."""
        try:
            with self._pool.using(served, stop) as loaded:
                assert loaded.embedder is not None
                request = EmbeddingRequest(task_id, spec, stop, loaded.embedder.inputs(spec), accepted)
                self._enqueue(loaded.batch, request)
                try:
                    self._wait(loaded.batch, request, None)
                finally:
                    with self._changed:
                        del self._requests[request]
        except Stopped:
            request = EmbeddingRequest(task_id, spec, stop, [], accepted)
            request.finish, request.after = stop.reason, self.counters()
        if request.error is not None:
            raise request.error
        assert request.finish is not None
        assert request.after is not None
        made = made_of(request.vectors, spec) if request.finish == "stop" else {}
        began = request.began or time.monotonic()
        return Generation(
            output=Output(text="", finish_reason=request.finish, **made),
            model=served.name,
            prompt_tokens=sum(map(len, request.inputs)),
            completion_tokens=0,
            wait=began - accepted,
            prefill=(request.last or began) - began,
            decode=0.0,
            energy=Energy(
                inference=request.inference,
                idle=request.idle,
                method=self._meter.method,
                estimated=self._meter.estimated,
            ),
            before=request.before or request.after,
            after=request.after,
            stalled=request.stalled,
        )

    # --- the decode thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or any(b.busy for b in self._pool.batches))
                if self._closing:
                    break
            for batch in self._pool.batches:
                self._step(batch)
        for batch in self._pool.batches:
            batch.fail(EngineError("the engine is closing", retry=True))

    @staticmethod
    def _step(batch: AnyBatch) -> None:
        if not batch.busy:
            return
        try:
            batch.step()
        except Exception as error:  # the engine must outlive whatever happens to a batch
            log.exception("step_failed")
            batch.fail(EngineError(f"the engine failed: {type(error).__name__}: {error}", retry=True))


def _new_request(
    task_id: str, spec: TaskSpec, stop: Stop, prompt: Prompt, samplers: Sequence[Sampler | None], accepted: float
) -> Request:
    request = Request(task_id, spec, stop, prompt.tokens, accepted)
    for index, sampler in enumerate(samplers):
        text = TextStream(spec.stop, prompt.form, prompt.marks, task_id, index)
        request.answers.append(Answer(request, index, sampler, text))
    return request


def _choice(answer: Answer) -> dict[str, Any]:
    """An answer that is over, as the fields of a `Choice`."""
    request, text = answer.request, answer.text
    finish: FinishReason | None = "length" if answer.shortened else answer.finish
    logprobs = None
    if request.spec.logprobs is not None:
        logprobs = request.prompt_logprobs + [entry for begins, entry in answer.logprobs if begins < text.extent]
    return {
        "text": request.echo + text.text,
        "finish_reason": finish and text.finish_reason(finish),
        "logprobs": logprobs,
        "reasoning": text.reasoning,
        "tool_calls": text.calls,
        "tokens": answer.generated,
    }
