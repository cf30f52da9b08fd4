"""Continuous batching: many requests in one context, stepped together.

Every step gives each decoding request one token and the prompts a bounded chunk. Requests join and leave between steps.
All methods belong to the one thread that steps, but for those marked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import structlog

from perllm.broker.engine.contract import EngineError, FinishReason, Stop
from perllm.broker.engine.energy import Attribution
from perllm.broker.engine.step_time import decode_work, is_stall, step_time
from perllm.broker.engine.totals import EngineTotals
from perllm.broker.messages import Counters, Delta, StepCost, TaskSpec
from perllm.edge_worker import llama
from perllm.edge_worker.batch_plan import Widths, choose_victim, share_prefill
from perllm.edge_worker.kv_cells import KVCells
from perllm.edge_worker.prefix_cache import SHORTEST, PrefixCache, common_prefix
from perllm.edge_worker.sampling import GrammarError, Sampler, constraint, token_logprobs
from perllm.edge_worker.text_stream import TextStream

log = structlog.get_logger(__name__)

#: A request joins others only if, beyond its prompt, each of them and itself has so many free cells to grow into.
HEADROOM = 16


@dataclass(slots=True, eq=False)
class Request:
    """One call of `generate`, from the queue to its end. Times are `time.monotonic()`."""

    task_id: str
    spec: TaskSpec
    stop: Stop
    tokens: list[int]  # the prompt's; the output's are appended
    sampler: Sampler | None  # None: always the most likely token
    text: TextStream
    accepted: float
    streams: bool = False  # put pieces of the answer into `outbox`
    outbox: SimpleQueue[Delta | None] = field(default_factory=SimpleQueue)  # None: it ended
    prompt_tokens: int = 0

    # In the batch
    sequence: int = -1
    prefilling: bool = True
    prefix_of: Request | None = None  # prefills a prefix this one waits to share …
    shared: int = 0  # … of so many tokens
    cached: int = 0
    logprobs: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (characters before it, entry)
    before: Counters | None = None
    began: float | None = None  # first prefill step
    first: float | None = None  # first token
    last: float | None = None  # last token
    stalled: bool = False
    inference: float = 0.0  # J
    idle: float = 0.0  # J

    # At the end
    finish: FinishReason | None = None
    error: EngineError | None = None
    after: Counters | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def generated(self) -> int:
        """Tokens of output so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.spec.max_tokens - self.generated

    @property
    def shortened(self) -> bool:
        """Whether it ended in time only because it was brought to an end."""
        return self.finish == "stop" and self.sampler is not None and self.sampler.shortened

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class BatchTuning:
    """How a batch is stepped, found by calibration."""

    chunk: int  # prompt tokens of one step at most
    widths: Widths  # of the decodes
    step_cost: StepCost

    def work(self, tokens: int, *, prefill: bool, decoding: int) -> float:
        """The cost of one request's part in a step, s: what its energy is shared by."""
        cost = self.step_cost
        return tokens * cost.prefill if prefill else decode_work(cost, sequences=decoding)


class Batch:
    """The requests in one model's context."""

    def __init__(
        self,
        model: llama.Model,
        context: llama.Context,
        tuning: BatchTuning,
        *,
        slots: int,
        cached_prompts: int,
        totals: EngineTotals,
        energy: Attribution,
        counters: Callable[[], Counters],
    ) -> None:
        """`context` holds `slots` + `cached_prompts` sequences; the latter keep ended requests' prompts. With
        none of them no prefixes are shared."""
        self.model, self.context = model, context
        self.tuning, self._totals, self._energy, self._counters = tuning, totals, energy, counters
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []  # oldest first
        self._slots, self._cached_prompts = slots, cached_prompts
        self._begin()

    def _begin(self) -> None:
        """An empty context's state."""
        slots = self._slots
        self._unused = list(range(slots))
        self._cells = KVCells(self.context.kv_tokens, slots)
        self._prefixes = PrefixCache(range(slots, slots + self._cached_prompts), self.context, self._cells)
        self._stepping: tuple[Request, ...] = ()
        self._computing: tuple[Request, ...] = ()

    @property
    def busy(self) -> bool:
        """From any thread."""
        return bool(self.active or self.waiting)

    @property
    def free_kv(self) -> int:
        """Tokens of KV cache free, or held only for reuse. From any thread."""
        return self._cells.free + self._cells.reusable

    @property
    def computing(self) -> Sequence[Request]:
        """Those being decoded or sampled now; all in the batch, where that is not known. From any thread."""
        return self._computing or tuple(self.active)

    @property
    def longest_step(self) -> float:
        """What a full step is expected to take, s."""
        return step_time(
            self.tuning.step_cost,
            sequences=self._slots,
            prefilled=self.tuning.chunk,
            context=self.context.kv_tokens,
        )

    def interrupt(self) -> None:
        """A request was cancelled: if all in the present step were, abort it. From any thread.

        With others in the step their work would be lost, and the step is short anyway. (Should the step end in between,
        the next one is aborted instead, and repeated.)
        """
        stepping = self._stepping
        if stepping and all(request.stop.reason for request in stepping):
            self.context.abort(True)

    def step(self) -> None:
        """Admit, plan, decode, sample. A request that fails ends with its error; the others go on."""
        for request in (*self.active, *self.waiting):
            if reason := request.stop.reason:
                request.finish = reason
                self._end(request)
        self._admit()
        prefilling, decoding = self._ready()
        if not prefilling and not decoding:
            return
        began = time.monotonic()
        sequences, context = len(self.active), sum(self._cells.length(r.sequence) for r in self.active)
        for request in prefilling:
            request.began = request.began or began
        groups = self._groups(prefilling, decoding)
        done = [part for group in groups for part in self._decode(group)]
        ended = time.monotonic()
        if not prefilling and len(done) == len(decoding):
            self.tuning.widths.observe(tuple(len(group) for group in groups), ended - began)
        fresh = set(prefilling)
        prefilled = sum(tokens for request, tokens in done if request in fresh)
        work = {r: self.tuning.work(tokens, prefill=r in fresh, decoding=len(decoding)) for r, tokens in done}
        if not work:
            return
        self._totals.step(began, ended, sequences=sequences, prefilled=prefilled, context=context)
        expected = step_time(self.tuning.step_cost, sequences=sequences, prefilled=prefilled, context=context)
        if is_stall(ended - began, expected):
            for request in self.active:
                request.stalled = True
        self._energy.work({request: amount for request, amount in work.items() if request.sequence >= 0})
        for request in work:
            if request.over:
                self._end(request)

    def fail(self, error: EngineError) -> None:
        """End every request with `error` and begin anew, whatever the state: the engine itself failed, or closes."""
        for request in (*self.active, *self.waiting):
            with suppress(KeyError):
                self._energy.leave(request)
            request.error = error
            request.outbox.put(None)
        self.active.clear()
        self.waiting.clear()
        self.context.clear()
        self._begin()

    # --- admission

    def _admit(self) -> None:
        while self.waiting and self._unused:
            request = self.waiting[0]
            need = len(request.tokens) + HEADROOM * (len(self.active) + 1)
            if self.active and need > self.free_kv:
                return
            self.waiting.popleft()
            request.before = request.before or self._counters()
            request.sequence = self._unused.pop()
            request.prefilling = True
            self._energy.enter(request)
            self.active.append(request)
            if self._cached_prompts:
                self._find_prefix(request)

    def _find_prefix(self, request: Request) -> None:
        """Share the longest prefix that another request or a cached prompt has computed, or is computing."""
        source, shared = self._prefixes.longest_match(request.tokens)
        if shared:
            self._prefixes.touch(source)
        computing = None
        for other in self.active:
            if other is request:
                break  # only older ones: nobody waits in a circle
            common = common_prefix(other.tokens, request.tokens)
            if common > shared:
                source, shared, computing = other.sequence, common, other
        shared = min(shared, len(request.tokens) - 1)  # the last token's logits are needed
        if shared < SHORTEST:
            return
        if computing is not None and self._cells.length(computing.sequence) < shared:
            request.prefix_of, request.shared = computing, shared
            return
        self.context.copy(source, request.sequence, shared)
        self._cells.share(source, request.sequence, shared)
        request.cached = max(request.cached, min(shared, request.prompt_tokens))

    def _ready(self) -> tuple[list[Request], list[Request]]:
        """The requests to prefill and to decode in this step."""
        for request in self.active:
            other = request.prefix_of
            if other and (other.sequence < 0 or self._cells.length(other.sequence) >= request.shared):
                request.prefix_of = None
                self._find_prefix(request)
        prefilling = [r for r in self.active if r.prefilling and r.prefix_of is None]
        return prefilling, [r for r in self.active if not r.prefilling]

    def _groups(self, prefilling: list[Request], decoding: list[Request]) -> list[list[tuple[Request, int]]]:
        """The decodes of this step: (request, tokens) each. Beside a prefill all go in one."""
        if prefilling:
            remaining = [len(r.tokens) - self._cells.length(r.sequence) for r in prefilling]
            chunks = share_prefill(remaining, min(self.tuning.chunk, self.context.batch_tokens - len(decoding)))
            parts = [(r, n) for r, n in zip(prefilling, chunks, strict=True) if n]
            return [[*((r, 1) for r in decoding), *parts]]
        rest = iter(decoding)
        return [[(next(rest), 1) for _ in range(width)] for width in self.tuning.widths.choose(len(decoding))]

    # --- one decode

    def _decode(self, group: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Compute (request, tokens) in one pass and sample. Returns those that were computed."""
        while True:
            group = [(r, n) for r, n in group if r.sequence >= 0]  # without the preempted
            if not group:
                return []
            if not self._make_room(sum(n for _, n in group)):
                continue
            rows = self._fill(group)
            self._stepping = self._computing = tuple(r for r, _ in group)
            self.context.abort(False)
            status = self.context.decode()
            self._stepping = ()
            self._computing = ()
            if status != llama.NO_KV_SLOT:
                break
            self._cells.correct(sum(n for _, n in group) - 1)
            self._preempt()
        if status == llama.ABORTED:
            return []
        if status != llama.OK:
            self._lose(group, status)
            return []
        for request, tokens in group:
            self._cells.grow(request.sequence, tokens)
        for request, row in rows:
            request.prefilling = False
            self._computing = (request,)
            try:
                self._sample(request, row)
            except Exception as error:  # one request's sampling must not take the others with it
                log.exception("sampling_failed", task_id=request.task_id)
                request.error = EngineError(f"sampling failed: {type(error).__name__}: {error}", retry=True)
        self._computing = ()
        return group

    def _fill(self, group: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Fill the context's batch; returns (request, row) for each that gets a token out of it."""
        rows = []
        self.context.begin()
        for request, tokens in group:
            start = self._cells.length(request.sequence)
            last = start + tokens == len(request.tokens)
            row = self.context.add(request.sequence, start, request.tokens[start : start + tokens], output=last)
            if last:
                rows.append((request, row))
        return rows

    def _lose(self, group: list[tuple[Request, int]], status: int) -> None:
        """llama.cpp failed: what it left in memory for these requests is unknown."""
        reason = f"llama.cpp could not compute the batch (status {status}): {llama.last_error()}"
        log.error("decode_failed", status=status, requests=len(group))
        for request, _ in group:
            request.error = EngineError(reason, retry=True)
            self._end(request, cache=False)

    def _make_room(self, cells: int) -> bool:
        """Whether so many cells are free, after evicting cached prompts; otherwise preempts one request."""
        while self._cells.free < cells and self._prefixes.evict_oldest():
            pass
        if self._cells.free >= cells:
            return True
        self._preempt()
        return False

    def _preempt(self) -> None:
        """KV cache full: put the request of least value per remaining work back into the queue. Its output so far is
        kept, and prefilled again when it returns."""
        if self._prefixes.evict_oldest():
            return
        worth = [(r.spec.value, len(r.tokens) + r.spec.max_tokens - r.generated) for r in self.active]
        victim = self.active[choose_victim(worth)]
        if len(self.active) == 1:
            victim.error = EngineError(
                f"{len(victim.tokens)} tokens do not fit into the KV cache of {self.context.kv_tokens}", retry=False
            )
            self._end(victim, cache=False)
            return
        log.debug("request_preempted", task_id=victim.task_id, tokens=len(victim.tokens), active=len(self.active))
        self._leave(victim)
        self.waiting.appendleft(victim)

    def _sample(self, request: Request, row: int) -> None:
        logits = self.context.logits(row)
        try:
            token = int(logits.argmax()) if request.sampler is None else request.sampler.sample(logits, request.left)
        except GrammarError as error:
            request.error = EngineError(f"{constraint(request.spec)}: {error}", retry=False)
            return
        now = time.monotonic()
        request.first = request.first or now
        request.last = now
        self._totals.generated += 1
        if self.model.ends(token):
            request.finish = "stop"
        else:
            if request.spec.logprobs is not None:
                entry = token_logprobs(self.model, logits, token, request.spec.logprobs)
                request.logprobs.append((request.text.length, entry))
            request.tokens.append(token)
            self._say(request, request.text.take(token, self.model.piece(token)))
            if request.text.stopped:
                request.finish = "stop"
            elif request.generated == request.spec.max_tokens:
                request.finish = "length"

    @staticmethod
    def _say(request: Request, deltas: list[Delta]) -> None:
        if request.streams:
            for delta in deltas:
                request.outbox.put(delta)

    # --- leaving

    def _leave(self, request: Request) -> None:
        """Take a request out of the batch and free its KV cells."""
        self.active.remove(request)
        self.context.remove(request.sequence)
        self._cells.drop(request.sequence)
        self._unused.append(request.sequence)
        request.sequence, request.prefix_of = -1, None
        used = self._energy.leave(request)
        request.inference += used.inference
        request.idle += used.idle

    def _end(self, request: Request, *, cache: bool = True) -> None:
        """A request is over: free what it holds and notify its caller."""
        if request.sequence >= 0:
            if cache and self._cached_prompts and not request.prefilling:
                self._prefixes.insert(request.sequence, request.tokens[: request.prompt_tokens])
            self._leave(request)
            self._prefixes.trim()
        else:
            self.waiting.remove(request)
        if request.sampler is not None:
            request.sampler.close()
        self._say(request, request.text.finish(cut=request.finish != "stop"))
        request.after = self._counters()
        request.outbox.put(None)
