"""vLLM in this process: one event-loop thread owns AsyncLLM, Celery's threads submit to it and wait.

All requests share vLLM's continuous batch. None is ever cancelled in asyncio's way, which can leak a request that is
just being added (vllm issue 57061): a request that is to stop is aborted by its id, and then ends by itself.

The engine proper runs in processes of its own. When they die, the requests inside fail at once, and the engine is
started anew; meanwhile `counters` and `generate` raise EngineDown.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import structlog

from perllm.broker.capabilities import Capability
from perllm.broker.chat import AnswerStream
from perllm.broker.engine.checks import check_kind, check_model, fitted
from perllm.broker.engine.contract import (
    EngineDown,
    EngineError,
    FinishReason,
    Generation,
    OnDelta,
    Stop,
    Stuck,
    counters_or_none,
)
from perllm.broker.engine.embedding import Vector, check_dimensions, check_input, made_of
from perllm.broker.engine.energy import WINDOW, Attribution, power_of
from perllm.broker.engine.step_time import decode_work, is_stall, step_time
from perllm.broker.engine.totals import EngineTotals
from perllm.broker.errors import BadSetting
from perllm.broker.messages import Choice, Counters, Delta, Energy, ModelOffer, Output, Power, StepCost, TaskSpec
from perllm.cloud_worker.backoff import backoff
from perllm.cloud_worker.event_loop import LoopThread, Pieces
from perllm.cloud_worker.nvml import GPU, NVMLDevice, NVMLMeter, PowerLimitMeter, Unreadable, make_meter, visible_gpus
from perllm.cloud_worker.priority import priority
from perllm.cloud_worker.reaper import Reaper
from perllm.cloud_worker.settings import CloudSettings
from perllm.cloud_worker.step_cost import TimedStep, energy_weights, fit_step_cost
from perllm.cloud_worker.vllm_capabilities import SERVED, SERVED_POOLED, capabilities

log = structlog.get_logger(__name__)

#: Requests in the batch at once unless set.
DEFAULT_SLOTS = 256
#: Python's switch interval, s: the loop thread is busy while a batch generates, and at the usual 5 ms Celery's threads
#: would wait that long for it at every turn of a claim or a delivery.
SWITCH_INTERVAL = 5e-4
#: Seconds between two polls of `Stop` for requests that get no tokens.
STOP_POLL = 0.02
#: Seconds without a step's end, with work there, after which vLLM is stuck: longer than anything it compiles on demand.
STUCK_SECONDS = 300.0
#: Tokens an answer usually has, until answers have shown it, and the weight of each: for those whose producer does not
#: say how long they may be.
USUAL_TOKENS, USUAL_WEIGHT = 128.0, 0.02
#: Pauses before the engine is started anew: the first and the longest, s, and how often it is tried.
RESTART_PAUSE, RESTART_LONGEST, RESTART_TRIES = 1.0, 60.0, 10
#: Calibration: requests at once with a long context and its tokens, at most; seconds of idling and decoding metered.
CALIBRATION_WIDTH, CALIBRATION_DEPTH, METERED = 64, 1024, 1.0

AnyMeter = NVMLMeter | PowerLimitMeter


@dataclass(slots=True, eq=False)
class _Request:
    """One call of `generate`. Times are `time.monotonic()`."""

    task_id: str
    spec: TaskSpec
    stop: Stop
    prompt: list[int] = field(default_factory=list)
    answers: list[_Answer] = field(default_factory=list)
    lora: Any = None
    echo: str = ""  # what the text of each answer begins with
    pieces: Pieces | None = None
    accepted: float = field(default_factory=time.monotonic)

    prompt_logprobs: list[Any] = field(default_factory=list)
    inputs: Sequence[Any] = ()  # of an embedding or rerank task; `prompt` is all their tokens
    vectors: list[Vector] = field(default_factory=list)  # what came of them
    failed: bool = False  # one answer did: the others are to end
    stalled: bool = False

    work: float = 0.0  # since the energy was last shared out, s by the step cost
    energy: Energy | None = None

    @property
    def generated(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def must_stop(self) -> bool:
        return self.failed or self.stop.reason is not None


@dataclass(slots=True, eq=False)
class _Answer:
    """One of a request's answers, to vLLM a request of its own. Times are `time.monotonic()`."""

    request: _Request
    index: int
    key: str  # vLLM's name for it
    params: Any
    stream: AnswerStream | None = None  # None: all of it is text

    first: float | None = None  # when its first token was seen here
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None  # vLLM's finish reason
    cached: int = 0  # tokens of the prompt
    metrics: Any = None  # vLLM's RequestStateStats: when it was scheduled, …
    credited: int = 0  # prompt tokens whose energy was shared out as they were computed
    failure: EngineError | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it, here and not in vLLM."""
        return self.stream is not None and self.stream.stopped


class VLLMEngine:
    """See the module's head. Thread-safe after `start`. `meter` is NVML's unless given."""

    def __init__(self, settings: CloudSettings, *, meter: AnyMeter | None = None) -> None:
        if settings.model is None:
            raise BadSetting("vLLM needs a model: set PERLLM_MODEL to a Hugging Face name or a folder")
        self._settings, self._meter_given = settings, meter
        self.slots = settings.slots or DEFAULT_SLOTS
        self.description = f"vLLM, {settings.model}, not started"
        self._name = settings.model_name or _producer_name(settings.model)
        self._totals = EngineTotals()
        self._step_cost = StepCost(step=0.01, sequence=0.0, prefill=1e-5)  # until it is measured
        self._usual_tokens = USUAL_TOKENS
        self._width: int | None = None  # of its embeddings, where it makes any
        self._keys = itertools.count()
        self._present: dict[_Answer, None] = {}  # oldest first
        self._prefilling: dict[_Answer, None] = {}  # those of them that compute a prompt, and have no token yet
        self._running = self._waiting = 0
        self._kv_used = 0.0
        self._step_ended = self._shared_out = 0.0
        self._before = 0.0, 0  # of the step before: when it began, and the prompt tokens it had room for
        self._timed: list[TimedStep] | None = None
        self._down: str | None = None
        self._hardware = "hardware unknown"
        self._loop: LoopThread | None = None
        self._reaper: Reaper | None = None
        self._meter: AnyMeter
        self._energy: Attribution
        self._llm: Any = None

    # --- life

    def start(self) -> None:
        """Load and calibrate the model. Raises BadSetting with what to change."""
        quiet_environment()
        from perllm.cloud_worker import vllm_api  # noqa: PLC0415  takes seconds, and much memory

        self._api = vllm_api
        self._args = vllm_api.engine_args(self._settings, self.slots)
        self._loras = vllm_api.lora_requests(self._settings.adapters, self._name)
        if missing := _missing_folder(self._args.model):
            raise BadSetting(missing)
        self._meter = self._meter_given or self._nvml_meter()
        self._loop = LoopThread("perllm-vllm")
        sys.setswitchinterval(SWITCH_INTERVAL)
        began = time.monotonic()
        try:
            self._loop.run(self._open())
        except RuntimeError as error:
            raise BadSetting(
                f"vLLM could not start with PERLLM_MODEL={self._args.model} ({error}). The cause is in its own log "
                "lines above, usually too little GPU memory: lower PERLLM_CONTEXT or PERLLM_SLOTS, choose a smaller "
                "model, or more GPUs with PERLLM_VLLM_ARGS='{\"tensor_parallel_size\": 2}'"
            ) from None
        self._prompter = vllm_api.Prompter(self._llm, self._settings)
        facts = vllm_api.facts(self._llm, self._tasks, self._prompter.template)
        self._capabilities = capabilities(facts, served=SERVED if "generate" in self._tasks else SERVED_POOLED)
        if not self._capabilities:
            raise BadSetting(f"PERLLM_MODEL={self._args.model}: vLLM runs it to {', '.join(self._tasks)} only")
        self._loop.run(self._calibrate())
        self._energy = Attribution(self._meter)
        self._loop.loop.call_soon_threadsafe(self._begin_watch)
        self.description = f"vLLM {vllm_api.VERSION}, {self._name}, {self._hardware}"
        log.info(
            "model_loaded",
            model=self._name,
            seconds=round(time.monotonic() - began, 1),
            kv_tokens=self._limits.kv_tokens,
            capabilities=", ".join(self._capabilities),
            step_ms=round(1e3 * (self._step_cost.step + self._step_cost.sequence), 2),
            prefill_tokens_per_s=round(1 / max(self._step_cost.prefill, 1e-9)),
            watts=round(self._meter.active),
        )

    def _nvml_meter(self) -> AnyMeter:
        args = self._args
        wanted = args.tensor_parallel_size * args.pipeline_parallel_size * args.data_parallel_size
        try:
            visible = visible_gpus()
            gpus = [NVMLDevice(which) for which in visible[:wanted]]
        except Unreadable as error:
            raise BadSetting(f"vLLM needs an NVIDIA GPU: {error}") from None
        if len(gpus) < wanted:
            raise BadSetting(f"PERLLM_VLLM_ARGS asks for {wanted} GPUs, and {len(visible)} can be seen")
        self._hardware = f"{wanted} × {gpus[0].name}"
        if args.kv_cache_memory_bytes is None:
            _check_memory(gpus, args.gpu_memory_utilization)
        settings = self._settings
        return make_meter(gpus, lambda: self._totals.busy, tdp=settings.tdp_watts, idle=settings.idle_watts)

    async def _open(self) -> None:
        """Start vLLM in this loop. Raises BadSetting, RuntimeError."""
        self._reaper = Reaper()
        self._reaper.watch()
        self._llm = self._api.open_engine(self._args, self._stepped)
        self._reaper.started()
        self._limits = self._api.limits(self._llm)
        self._tasks = frozenset(await self._llm.get_supported_tasks())  # asked once, and kept by vLLM
        for name, lora in self._loras.items():
            try:
                await self._llm.add_lora(lora)
            except Exception as error:  # vLLM's utility calls raise nothing more special
                raise BadSetting(f"PERLLM_ADAPTERS: vLLM cannot load {name}: {error}") from None

    def _shut(self) -> None:
        """End vLLM's processes. In the loop."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
        if self._reaper is not None:
            self._reaper.close()

    def close(self) -> None:
        """Stop every generation and free the GPU. Idempotent."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        loop.close(self._finish())
        self._meter.close()

    async def _finish(self) -> None:
        self._shut()

    # --- what the worker asks

    def offers(self) -> tuple[ModelOffer, ...]:
        """The model, and each adapter as "<model>:<adapter>". They share one KV cache and one step cost."""
        return tuple(
            ModelOffer(
                name=name,
                context=self._limits.context,
                kv_tokens=self._limits.kv_tokens,
                calibration=self._step_cost,
                capabilities=self._capabilities,
                dimensions=self._width,
            )
            for name in (self._name, *self._loras)
        )

    def power(self) -> Power:
        """Measured at the start: idle with the model loaded, and beyond that while a full batch decodes."""
        return power_of(self._meter, self._settings.joules_per_byte)

    def counters(self) -> Counters:
        """Totals since `start` and the present state. Raises EngineDown."""
        if self._down is not None:
            raise EngineDown(self._down, inside=False)
        present = len(self._present)
        running = min(self._running, present)
        return self._totals.counters(
            active=running,
            waiting=present - running,
            free_kv=round((1.0 - self._kv_used) * self._limits.kv_tokens) if present else self._limits.kv_tokens,
            energy=self._meter.read(),
        )

    def progress(self) -> Mapping[str, int]:
        """Task id → tokens generated so far."""
        return {answer.request.task_id: answer.request.generated for answer in list(self._present)}

    def stuck(self) -> Stuck | None:
        """Whether vLLM's processes live and do nothing for longer than anything they compile on demand takes."""
        present = [answer.request.task_id for answer in list(self._present)]
        silent = time.monotonic() - self._totals.last_progress
        if self._down is not None or not present or silent <= STUCK_SECONDS:
            return None
        return Stuck(f"vLLM has not got on for {silent:.0f} s", frozenset(present))

    # --- one request

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        """Run one task to its end or until `stop`. Raises EngineError."""
        check_model(spec.model, (self._name, *self._loras))
        check_kind(spec.kind, self._name, self._capabilities)
        accepted = time.monotonic()
        request = _Request(task_id, spec, stop, accepted=accepted)
        request.lora = self._loras.get(spec.model or "")
        if spec.kind == "generate":
            self._prepare(request, wanted=on_delta is not None)
        else:
            request.inputs = self._inputs(spec)
            request.prompt = [token for one in request.inputs for token in one.ids]
            request.answers.append(_Answer(request, 0, f"{task_id}.{next(self._keys)}", None))
        before = self.counters()  # raises EngineDown
        loop = self._loop
        if loop is None:
            raise EngineError("the engine is closed", retry=True)
        try:
            if on_delta is None or request.pieces is None:
                loop.run(self._serve(request))
            else:
                loop.run_streaming(self._serve(request), request.pieces, on_delta, stop)
        except CancelledError:
            raise EngineError("the engine is closing", retry=True) from None
        return self._generation(request, before)

    def _prepare(self, request: _Request, *, wanted: bool) -> None:
        """The prompt of a task that generates, and its answers; `wanted` says whether as they come. Raises
        EngineError."""
        prompt = self._prompter.prompt(request.spec)
        request.prompt = prompt.tokens
        request.spec = spec = fitted(request.spec, len(prompt.tokens), self._limits.context)
        for index, params in enumerate(self._api.sampling_params(spec, spec.max_tokens, prompt)):
            answer = _Answer(request, index, f"{request.task_id}.{next(self._keys)}", params)
            answer.stream = self._prompter.answer(spec, prompt, request.task_id, index)
            request.answers.append(answer)
        request.echo = self._prompter.echo(spec)
        if wanted:
            request.pieces = SimpleQueue()

    def _inputs(self, spec: TaskSpec) -> Sequence[Any]:
        """The inputs of an embedding or rerank task. Raises EngineError."""
        if self._width is not None:
            check_dimensions(spec.dimensions, self._width)
        inputs = self._prompter.inputs(spec)
        for number, one in enumerate(inputs):
            check_input(number, len(one.ids), self._limits.context)
            if spec.input_ids and max(one.ids) >= self._limits.vocabulary:
                known = self._limits.vocabulary
                raise EngineError(f"input {number}: {max(one.ids)} is no token; the model knows {known}", retry=False)
        return inputs

    async def _serve(self, request: _Request) -> None:
        """From vLLM's queue to the last token of the last answer. Raises EngineError."""
        if self._down is not None:
            raise EngineDown(self._down, inside=False)
        now = time.monotonic()
        if not self._present:
            self._step_ended = self._totals.last_progress = now
        self._prefilling[request.answers[0]] = None  # the others find the prompt computed
        self._energy.enter(request)
        for answer in request.answers:
            self._say(answer, request.echo)
        try:
            ends = await asyncio.gather(*map(self._follow, request.answers), return_exceptions=True)
        finally:
            request.energy = self._energy.leave(request)
        for end in ends:
            if end is not None:
                raise end

    async def _follow(self, answer: _Answer) -> None:
        """One answer, likewise. Raises EngineError, and has the others end then."""
        request = answer.request
        self._present[answer] = None
        try:
            if request.inputs:
                await self._pool(answer)
                return
            async for output in self._outputs(answer):
                self._take(answer, output)
                if (request.must_stop or answer.stopped or answer.failure is not None) and not output.finished:
                    await self._llm.abort(answer.key)
            self._end(answer)
        except self._api.EngineDeadError:
            raise self._died(inside=True) from None
        except self._api.EngineGenerateError as error:
            if self._llm is None or self._llm.errored:
                raise self._died(inside=True) from None
            raise EngineError(f"vLLM failed: {error.__cause__ or error}", retry=True) from None
        except ValueError as error:
            raise EngineError(f"vLLM does not accept it: {error}", retry=False) from None
        finally:
            self._share_out()
            request.failed = request.failed or answer.finish is None
            del self._present[answer]
            self._prefilling.pop(answer, None)

    async def _pool(self, answer: _Answer) -> None:
        """All inputs of an embedding or rerank task, side by side in vLLM's batch, under one name: so one abort ends
        all of them. Raises the first failure, once all have ended."""
        request = answer.request
        spec, remaining = request.spec, request.stop.remaining
        work = len(request.prompt) * self._step_cost.prefill
        urgency = priority(time.monotonic(), remaining, spec.value, work)
        vectors: dict[int, Any] = {}
        room = asyncio.Semaphore(self.slots)

        async def one(number: int, ids: Sequence[int], second: int | None) -> None:
            async with room:
                if request.stop.reason is not None:
                    return
                async for output in self._llm.encode(
                    self._api.tokens_input(list(ids)),
                    self._api.pooling_params(spec.kind, second),
                    answer.key,
                    lora_request=request.lora,
                    priority=urgency,
                ):
                    vectors[number] = self._api.numbers(output)
                    answer.cached += output.num_cached_tokens or 0
                    answer.first = answer.first or time.monotonic()

        every = [one(number, *given) for number, given in enumerate(request.inputs)]
        for failure in await asyncio.gather(*every, return_exceptions=True):
            if isinstance(failure, BaseException):
                raise failure
        left = len(request.prompt) - answer.cached - answer.credited
        request.work += max(0, left) * self._step_cost.prefill
        request.vectors = [vector for _, vector in sorted(vectors.items()) if len(vector)]
        answer.finish = "stop" if len(request.vectors) == len(request.inputs) else "abort"

    def _outputs(self, answer: _Answer) -> Any:
        request = answer.request
        spec, remaining = request.spec, request.stop.remaining
        tokens = spec.expected_tokens or (self._usual_tokens if spec.fit_context else spec.max_tokens)
        work = tokens * step_time(self._step_cost, sequences=len(self._present))
        return self._llm.generate(
            self._api.tokens_input(request.prompt),
            answer.params,
            answer.key,
            lora_request=request.lora,
            priority=priority(time.monotonic(), remaining, spec.value, work),
        )

    def _take(self, answer: _Answer, output: Any) -> None:
        """One engine step's output for one answer. Called tens of thousands of times a second: little may be done."""
        request = answer.request
        (completion,) = output.outputs
        tokens = completion.token_ids
        if tokens:
            if answer.first is None:
                answer.first = time.monotonic()
                answer.cached = output.num_cached_tokens or 0
                self._prefilling.pop(answer, None)
                left = len(request.prompt) - answer.cached - answer.credited
                request.work += max(0, left) * self._step_cost.prefill
            answer.tokens.extend(tokens)
            request.work += len(tokens) * decode_work(
                self._step_cost, sequences=self._running, context=len(request.prompt) + len(answer.tokens)
            )
        if answer.stream is not None:
            self._parse(answer, partial(answer.stream.push, completion.text, tokens))
        elif completion.text:
            answer.text.append(completion.text)
            self._say(answer, completion.text)
        if completion.logprobs:
            answer.logprobs.extend(completion.logprobs)
        if output.prompt_logprobs:
            request.prompt_logprobs.extend(output.prompt_logprobs)
        answer.finish = completion.finish_reason
        answer.metrics = output.metrics

    @staticmethod
    def _say(answer: _Answer, text: str) -> None:
        if text and answer.request.pieces is not None:
            answer.request.pieces.put(Delta(index=answer.index, text=text))

    def _end(self, answer: _Answer) -> None:
        """It is over: its last pieces. Raises EngineError, if it could not be parsed."""
        if answer.stream is not None:
            self._parse(answer, partial(answer.stream.finish, cut=answer.finish != "stop"))
        if answer.failure is not None:
            raise answer.failure

    @staticmethod
    def _parse(answer: _Answer, parse: Callable[[], list[Delta]]) -> None:
        """What a parser does not take ends this answer, as a stop does: by its key."""
        if answer.failure is not None:
            return
        try:
            deltas = parse()
        except EngineError as error:
            answer.failure = error
            return
        if answer.request.pieces is not None:
            for delta in deltas:
                answer.request.pieces.put(delta)

    def _generation(self, request: _Request, before: Counters) -> Generation:
        spec, now = request.spec, time.monotonic()
        first = min((answer.first for answer in request.answers if answer.first is not None), default=now)
        prefill = decode = 0.0
        # The engine's own clock: differences only
        if stats := [a.metrics for a in request.answers if a.first is not None and a.metrics is not None]:
            began = min(each.first_token_ts for each in stats)
            prefill = max(0.0, began - stats[0].scheduled_ts) if stats[0].scheduled_ts else 0.0
            decode = max(0.0, max(each.last_token_ts for each in stats) - began)
        assert request.energy is not None
        if spec.kind == "generate":
            for answer in request.answers:
                self._usual_tokens += USUAL_WEIGHT * (len(answer.tokens) - self._usual_tokens)
        head, *more = [self._choice(answer) for answer in request.answers]
        if request.inputs:
            prefill = now - first
            if head["finish_reason"] == "stop":
                head |= made_of(request.vectors, spec)
        return Generation(
            output=Output(**head, more=tuple(Choice(**each) for each in more)),
            model=spec.model or self._name,
            prompt_tokens=len(request.prompt),
            completion_tokens=request.generated,
            wait=max(0.0, first - request.accepted - prefill),
            prefill=prefill,
            decode=decode,
            energy=request.energy,
            before=before,
            after=counters_or_none(self),
            reasoning_tokens=sum(a.stream.reasoning_tokens for a in request.answers if a.stream is not None),
            cached_tokens=request.answers[0].cached,
            stalled=request.stalled,
        )

    def _choice(self, answer: _Answer) -> dict[str, Any]:
        """An answer that is over, as the fields of a `Choice`. Raises EngineError."""
        request, logprobs = answer.request, None
        if (top := request.spec.logprobs) is not None:
            logprobs = self._prompter.prompt_logprobs(request.prompt, request.prompt_logprobs, top)
            logprobs += self._api.openai_logprobs(answer.tokens, answer.logprobs, top)
        stream, finish = answer.stream, self._finish_reason(answer)
        return {
            "text": request.echo + ("".join(answer.text) if stream is None else stream.text),
            "finish_reason": finish if stream is None else stream.finish_reason(finish),
            "logprobs": logprobs,
            "reasoning": None if stream is None else stream.reasoning,
            "tool_calls": () if stream is None else stream.calls,
            "tokens": len(answer.tokens),
        }

    @staticmethod
    def _finish_reason(answer: _Answer) -> FinishReason:
        if answer.stopped:
            return "stop"
        match answer.finish:
            case "length":
                return "length"
            case "stop" | "repetition":
                return "stop"
            case "abort" if answer.request.stop.reason is not None:
                return answer.request.stop.reason
            case other:
                raise EngineError(f"vLLM ended it by itself ({other})", retry=True)

    # --- in the loop, beside the requests

    def _stepped(
        self, running: int, waiting: int, kv_used: float, generated: int, prefilled: int, finished: int
    ) -> None:
        """vLLM ended a step. (Its figures are of the time after it: what finished in it is not among the running.)"""
        now = time.monotonic()
        self._running, self._waiting, self._kv_used = running, waiting, kv_used
        sequences = running + finished
        if sequences == 0:
            return
        began, self._step_ended = self._step_ended, now
        context = round(kv_used * self._limits.kv_tokens)
        self._totals.step(began, now, sequences=sequences, prefilled=prefilled, context=context)
        self._totals.generated += generated
        if self._timed is not None:
            self._timed.append(TimedStep(now - began, sequences, prefilled, context))
            return
        self._credit_prefills(*self._before)
        self._before = began, self._limits.step_tokens - generated
        expected = step_time(self._step_cost, sequences=sequences, prefilled=self._limits.step_tokens, context=context)
        if is_stall(now - began, expected):
            for answer in self._present:
                answer.request.stalled = True
        if now - self._shared_out >= WINDOW:
            self._share_out()

    def _credit_prefills(self, began: float, budget: int) -> None:
        """Prompts longer than a step's budget are computed over several, and vLLM reports them only at the end. So
        the budget of a step is credited to those that still wait for their first token after it, in the order they
        came."""
        for answer in self._prefilling:
            if budget <= 0:
                return
            request = answer.request
            if request.accepted < began:
                tokens = min(budget, len(request.prompt) - answer.credited)
                answer.credited += tokens
                request.work += tokens * self._step_cost.prefill
                budget -= tokens

    def _share_out(self) -> None:
        """Split the energy since the last time over the work since the last time."""
        self._shared_out = time.monotonic()
        work: dict[Hashable, float] = {}
        for answer in self._present:
            request = answer.request
            if request.work:
                work[request] = request.work
                request.work = 0.0
        self._energy.work(work)

    def _begin_watch(self) -> None:
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        """Stop requests that get no tokens just now, and notice an engine that died with nobody inside."""
        while True:
            await asyncio.sleep(STOP_POLL)
            if self._down is not None:
                continue
            if self._llm.errored:
                self._died(inside=True)
                continue
            stopped = [answer.key for answer in self._present if answer.request.must_stop]
            if stopped:
                try:
                    await self._llm.abort(stopped)
                except Exception as error:  # the engine may be dying; then its requests end anyway
                    log.warning("abort_failed", reason=str(error))

    # --- death and return

    def _died(self, *, inside: bool) -> EngineDown:
        if self._down is None:
            self._down = "vLLM's engine died and is being started anew"
            log.error("engine_died", answers=len(self._present))
            self._returning = asyncio.ensure_future(self._come_back())
        return EngineDown(self._down, inside=inside)

    async def _come_back(self) -> None:
        for tries in range(1, RESTART_TRIES + 1):
            await asyncio.sleep(backoff(tries, first=RESTART_PAUSE, longest=RESTART_LONGEST))
            try:
                self._shut()
                await self._open()
            except Exception as error:  # whatever it was, it may be better the next time
                log.error("engine_restart_failed", tries=tries, reason=str(error))
            else:
                self._running = self._waiting = 0
                self._kv_used = 0.0
                self._down = None
                log.info("engine_back", tries=tries)
                return
        log.critical("engine_lost", hint="the worker ends: vLLM cannot be started any more")
        os.kill(os.getpid(), signal.SIGTERM)

    # --- calibration

    async def _calibrate(self) -> None:
        """Meter the idle GPU, time steps of several kinds, and meter a full batch (a few seconds)."""
        width = min(self.slots, CALIBRATION_WIDTH)
        depth = max(
            16,
            min(
                CALIBRATION_DEPTH,
                self._limits.context // 2,
                self._limits.step_tokens // 2,
                self._limits.kv_tokens // (2 * width),
            ),
        )
        for count, prompt in ((1, depth), (self.slots, 16)):  # kernels are compiled when they are first needed
            await self._time_steps(count, prompt, 4)
        idle = await self._metered(asyncio.sleep(METERED))
        steps: list[TimedStep | None] = []
        if Capability.GENERATE in self._capabilities:
            decodes = [(1, 16), (1, depth), (width, 16), (width, depth), (self.slots, 16)]
            steps += [_median_decode(await self._time_steps(count, prompt, 24), count) for count, prompt in decodes]
        prefills = [(1, depth // 2), (1, depth)] * 2
        if Capability.GENERATE not in self._capabilities:
            prefills += [(1, 16), (width, 16), (self.slots, 16)] * 2
        for count, prompt in prefills:
            steps += [step for step in await self._time_steps(count, prompt, 1) if step.prefilled]
        self._step_cost = fit_step_cost([step for step in steps if step is not None])
        seconds = step_time(self._step_cost, sequences=self.slots, context=16 * self.slots)
        tokens = int(min(self._limits.context - 16, max(24, METERED / max(seconds, 1e-6))))
        full = await self._metered(self._fill(tokens))
        meter = self._meter
        meter.idle = self._settings.idle_watts if self._settings.idle_watts is not None else idle
        meter.active = max(0.0, full - meter.idle)
        meter.method = f"{meter.method} ({energy_weights(self._step_cost)})"
        self._totals = EngineTotals()  # calibration is no task

    async def _fill(self, tokens: int) -> None:
        """Keep the batch full: for so many tokens each, or where nothing is generated for `METERED` s."""
        until = time.monotonic() + METERED
        await self._time_steps(self.slots, 16, tokens)
        while Capability.GENERATE not in self._capabilities and time.monotonic() < until:
            await self._time_steps(self.slots, 16, 1)

    async def _metered(self, doing: Any) -> float:
        """Mean W while it was done."""
        began, joules = time.monotonic(), self._meter.read()
        await doing
        return (self._meter.read() - joules) / (time.monotonic() - began)

    async def _time_steps(self, count: int, prompt: int, tokens: int) -> list[TimedStep]:
        """The steps of `count` requests at once, of so many tokens each way. No two prompts are alike."""
        steps = self._timed = []
        self._step_ended = time.monotonic()
        await asyncio.gather(*(self._calibration_request(prompt, tokens) for _ in range(count)))
        self._timed = None
        return steps

    async def _calibration_request(self, prompt: int, tokens: int) -> None:
        ids = random.choices(range(self._limits.vocabulary), k=prompt)
        key = f"calibration.{next(self._keys)}"
        if Capability.GENERATE not in self._capabilities:
            kind = "embed" if Capability.EMBEDDINGS in self._capabilities else "rerank"
            async for output in self._llm.encode(self._api.tokens_input(ids), self._api.pooling_params(kind), key):
                self._width = len(self._api.numbers(output)) if kind == "embed" else None
            return
        params = self._api.calibration_params(tokens)
        async for _ in self._llm.generate(self._api.tokens_input(ids), params, key):
            pass


def _median_decode(steps: Sequence[TimedStep], count: int) -> TimedStep | None:
    """The usual step in which all `count` sequences decode and nothing is prefilled: the median by time."""
    steps = sorted((s for s in steps if s.prefilled == 0 and s.sequences == count), key=lambda s: s.seconds)
    return steps[len(steps) // 2] if steps else None


def quiet_environment() -> None:
    """Defaults for what vLLM reads from the environment; what the user has set stays."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads: it must not be forked
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def _missing_folder(model: str) -> str | None:
    """What is wrong with a model that is given as a path; None for one that is there, or for a name."""
    if not model.startswith(("/", ".", "~")):
        return None
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return f"PERLLM_MODEL: there is no folder {folder}"
    if not (folder / "config.json").is_file():
        return f"PERLLM_MODEL: {folder} holds no config.json: it is not a Hugging Face model"
    return None


def _check_memory(gpus: Sequence[GPU], share: float) -> None:
    """vLLM takes `share` of each GPU's memory at once, and fails when less is free."""
    for gpu in gpus:
        try:
            free, total = gpu.memory()
        except Unreadable:
            continue  # vLLM checks itself
        if free < share * total:
            fits = int(100 * free / total) / 100
            raise BadSetting(
                f"{gpu.name} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, and vLLM would take {share:.0%} "
                f"of all: stop what else uses it, or set PERLLM_VLLM_ARGS='{{\"gpu_memory_utilization\": {fits}}}'"
            )


def _producer_name(model: str) -> str:
    """A Hugging Face name as it is; a folder's last part."""
    return Path(model).expanduser().name if model.startswith(("/", ".", "~")) else model
