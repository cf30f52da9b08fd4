"""Embedding and reranking: the inputs of many requests, computed side by side in one model's context.

An input is computed whole in one step and leaves nothing behind; a step takes as many inputs as its budget of tokens
allows, of all requests. All methods belong to the one thread that steps, but for those marked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

import structlog

from perllm.broker.engine.contract import EngineError, FinishReason, Stop
from perllm.broker.engine.energy import Attribution
from perllm.broker.engine.step_time import is_stall, step_time
from perllm.broker.engine.totals import ModelTotals
from perllm.broker.messages import Counters, Delta, StepCost, TaskSpec
from perllm.edge_worker import llama
from perllm.edge_worker.batch_plan import share_inputs

log = structlog.get_logger(__name__)

#: Most inputs of one step (each is a sequence of llama.cpp's).
STEP_INPUTS = 128


@dataclass(slots=True, eq=False)
class EmbeddingRequest:
    """One call of `generate` for an embedding or rerank task, from the queue to its end. Times are
    `time.monotonic()`."""

    task_id: str
    spec: TaskSpec
    stop: Stop
    inputs: Sequence[Sequence[int]]  # their tokens
    accepted: float
    outbox: SimpleQueue[Delta | None] = field(default_factory=SimpleQueue)  # None: it ended
    generated: int = 0  # tokens of output: there are none

    # In the batch
    vectors: list[llama.Vector] = field(default_factory=list)  # of its first inputs
    left: int = 0  # tokens of the others
    before: Counters | None = None
    began: float | None = None  # first step
    last: float | None = None  # end of the last one
    stalled: bool = False
    inference: float = 0.0  # J
    idle: float = 0.0  # J

    # At the end
    finish: FinishReason | None = None
    error: EngineError | None = None
    after: Counters | None = None

    def __post_init__(self) -> None:
        self.left = sum(map(len, self.inputs))

    @property
    def lengths(self) -> list[int]:
        """Tokens of its next inputs, as many as a step may take."""
        done = len(self.vectors)
        return [len(tokens) for tokens in self.inputs[done : done + STEP_INPUTS]]


@dataclass(frozen=True, slots=True)
class EmbeddingTuning:
    """How such a batch is stepped, found by calibration."""

    chunk: int  # tokens of one step, but for a longer input
    step_cost: StepCost


class EmbeddingBatch:
    """The requests in one model's context."""

    def __init__(
        self,
        context: llama.Context,
        tuning: EmbeddingTuning,
        *,
        slots: int,
        totals: ModelTotals,
        energy: Attribution,
        counters: Callable[[], Counters],
    ) -> None:
        self.context, self.tuning = context, tuning
        self._slots, self._totals, self._energy, self._counters = slots, totals, energy, counters
        self.waiting: deque[EmbeddingRequest] = deque()
        self.active: list[EmbeddingRequest] = []  # oldest first
        self._computing: tuple[EmbeddingRequest, ...] = ()

    @property
    def busy(self) -> bool:
        """From any thread."""
        return bool(self.active or self.waiting)

    @property
    def free_kv(self) -> int:
        """Tokens a step may take: nothing is held from one to the next. From any thread."""
        return self.context.batch_tokens

    @property
    def computing(self) -> Sequence[EmbeddingRequest]:
        """Those being computed now; all in the batch, where that is not known. From any thread."""
        return self._computing or tuple(self.active)

    @property
    def longest_step(self) -> float:
        """What a full step is expected to take, s."""
        return step_time(self.tuning.step_cost, sequences=STEP_INPUTS, prefilled=self.context.batch_tokens)

    def interrupt(self) -> None:
        """A request was cancelled: if all in the present step were, abort it. From any thread."""
        computing = self._computing
        if computing and all(request.stop.reason for request in computing):
            self.context.abort(True)

    def step(self) -> None:
        """Admit, plan, compute, read. A request that fails ends with its error; the others go on."""
        for request in (*self.active, *self.waiting):
            if reason := request.stop.reason:
                request.finish = reason
                self._end(request)
        while self.waiting and len(self.active) < self._slots:
            self._admit(self.waiting.popleft())
        if not self.active:
            return
        counts = share_inputs(
            [request.lengths for request in self.active],
            [request.left for request in self.active],
            min(self.tuning.chunk, self.context.batch_tokens),
            STEP_INPUTS,
        )
        parts = [(request, count) for request, count in zip(self.active, counts, strict=True) if count]
        began = time.monotonic()
        for request, _ in parts:
            request.began = request.began or began
        tokens = self._compute(parts)
        if not tokens:
            return
        ended = time.monotonic()
        self._account(parts, tokens, began, ended)
        for request, _ in parts:
            if len(request.vectors) == len(request.inputs):
                request.finish = "stop"
                self._end(request)

    def fail(self, error: EngineError) -> None:
        """End every request with `error`: the engine itself failed, or closes."""
        for request in (*self.active, *self.waiting):
            with suppress(KeyError):
                self._energy.leave(request)
            request.error = error
            request.outbox.put(None)
        self.active.clear()
        self.waiting.clear()
        self.context.clear()

    def _admit(self, request: EmbeddingRequest) -> None:
        request.before = self._counters()
        self._energy.enter(request)
        self.active.append(request)

    def _compute(self, parts: Sequence[tuple[EmbeddingRequest, int]]) -> list[int]:
        """Compute so many of the next inputs of each request; returns the tokens each took, nothing where the step was
        aborted or failed."""
        tokens, sequence = [], 0
        self.context.begin()
        for request, count in parts:
            done = len(request.vectors)
            for ids in request.inputs[done : done + count]:
                self.context.add(sequence, 0, ids, output=True)
                sequence += 1
            tokens.append(sum(map(len, request.inputs[done : done + count])))
        self._computing = tuple(request for request, _ in parts)
        self.context.abort(False)
        status = self.context.decode()
        self._computing = ()
        try:
            if status == llama.ABORTED:
                return []
            if status != llama.OK:
                raise llama.LlamaError(f"status {status}: {llama.last_error()}")
            vectors = iter([self.context.vector(number).copy() for number in range(sequence)])
        except llama.LlamaError as error:
            self._lose([request for request, _ in parts], str(error))
            return []
        finally:
            self.context.clear()
        for (request, count), used in zip(parts, tokens, strict=True):
            request.vectors += [next(vectors) for _ in range(count)]
            request.left -= used
        return tokens

    def _account(
        self, parts: Sequence[tuple[EmbeddingRequest, int]], tokens: Sequence[int], began: float, ended: float
    ) -> None:
        cost, inputs, prefilled = self.tuning.step_cost, sum(count for _, count in parts), sum(tokens)
        self._totals.step(began, ended, sequences=inputs, prefilled=prefilled, context=0)
        if is_stall(ended - began, step_time(cost, sequences=inputs, prefilled=prefilled)):
            for request in self.active:
                request.stalled = True
        self._energy.work(
            {
                request: used * (cost.prefill + cost.step / prefilled) + count * cost.sequence
                for (request, count), used in zip(parts, tokens, strict=True)
            }
        )
        for request, _ in parts:
            request.last = ended

    def _lose(self, requests: Sequence[EmbeddingRequest], reason: str) -> None:
        log.error("embedding_failed", reason=reason, requests=len(requests))
        for request in requests:
            request.error = EngineError(f"llama.cpp could not compute the batch ({reason})", retry=True)
            self._end(request)

    def _end(self, request: EmbeddingRequest) -> None:
        """A request is over: notify its caller."""
        if request in self.active:
            self.active.remove(request)
            used = self._energy.leave(request)
            request.inference, request.idle = used.inference, used.idle
        else:
            self.waiting.remove(request)
        request.after = self._counters()
        request.outbox.put(None)
