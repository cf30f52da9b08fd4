"""Continuous batching: many requests in one context, stepped together.

Every step gives each decoding answer one token and the prompts a bounded chunk. A request may want several answers to
its prompt. Each is a sequence of the context: one computes the prompt, the others begin as copies of it. With more
answers than sequences free they take turns. Answers join and leave between steps. All methods belong to the one thread
that steps, but for those marked.
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
from perllm.broker.engine.totals import ModelTotals
from perllm.broker.messages import Counters, Delta, StepCost, TaskSpec
from perllm.edge_worker import llama
from perllm.edge_worker.batch_plan import Widths, choose_victim, share_prefill
from perllm.edge_worker.kv_cells import KVCells
from perllm.edge_worker.prefix_cache import SHORTEST, PrefixCache, common_prefix
from perllm.edge_worker.sampling import GrammarError, Sampler, constraint, first_logprobs, token_logprobs
from perllm.edge_worker.text_stream import TextStream

log = structlog.get_logger(__name__)

#: Tokens of a prompt whose log-probabilities are asked for that are computed in one step: each takes a row of logits.
SCORED = 32
#: A request joins others only if, beyond its prompt, each of them and itself has so many free cells to grow into.
HEADROOM = 16
#: Tokens from which on an answer's pace is known, and the part of the time to its deadline that is kept for delivery.
PACED, DELIVERY = 8, 0.2

#: Tokens a request is taken for whose producer did not say how many at most, while it has generated fewer.
FEW_TOKENS = 64


@dataclass(slots=True, eq=False)
class Request:
    """One call of `generate`, from the queue to its end. Times are `time.monotonic()`."""

    task_id: str
    spec: TaskSpec
    stop: Stop
    prompt: list[int]
    accepted: float
    answers: list[Answer] = field(default_factory=list)  # as many as the spec wants
    echo: str = ""  # what the text of each answer begins with
    streams: bool = False  # put pieces of the answers into `outbox`
    outbox: SimpleQueue[Delta | None] = field(default_factory=SimpleQueue)  # None: it ended

    # In the batch
    cached: int = 0  # tokens of the prompt that were there already
    prompt_logprobs: list[dict[str, Any]] = field(default_factory=list)  # where they are echoed
    before: Counters | None = None
    began: float | None = None  # first prefill step
    stalled: bool = False
    inference: float = 0.0  # J
    idle: float = 0.0  # J

    # At the end
    error: EngineError | None = None  # of one answer, and so of all
    after: Counters | None = None

    @property
    def generated(self) -> int:
        """Tokens of output so far, of all answers."""
        return sum(answer.generated for answer in self.answers)

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt are still to be found: then all of it must be computed."""
        wanted = self.spec.echo and self.spec.logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.prompt)

    @property
    def in_batch(self) -> int:
        """How many of its answers are in the batch."""
        return sum(answer.sequence >= 0 for answer in self.answers)

    @property
    def work(self) -> int:
        """Tokens of the prompt and of all answers that are not over, at most."""
        there = sum(answer.generated + answer.left for answer in self.answers if answer.finish is None)
        return len(self.prompt) + there


@dataclass(slots=True, eq=False)
class Answer:
    """One of a request's answers. Times are `time.monotonic()`."""

    request: Request
    index: int
    sampler: Sampler | None  # None: always the most likely token
    text: TextStream
    tokens: list[int] = field(init=False)  # the prompt's; the output's are appended

    # In the batch
    sequence: int = -1
    prefilling: bool = True
    prefix_of: Answer | None = None  # prefills a prefix this one waits to share …
    shared: int = 0  # … of so many tokens
    logprobs: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (characters before it, entry)
    first: float | None = None  # first token
    last: float | None = None  # last token

    # At the end
    finish: FinishReason | None = None
    ended: bool = False  # it holds nothing any more

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def generated(self) -> int:
        """Tokens of output so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens it may still generate; of one whose producer did not say, as many as it has, or a few."""
        spec = self.request.spec
        most = spec.max_tokens - self.generated
        return min(most, max(self.generated, FEW_TOKENS)) if spec.fit_context else most

    @property
    def reach(self) -> int:
        """Tokens to its limit, or to its deadline at the pace so far, with time to deliver it: a document that must be
        whole has to end within them."""
        most = self.request.spec.max_tokens - self.generated
        remaining = self.request.stop.remaining
        if remaining is None or self.first is None or self.generated < PACED:
            return most
        pace = (time.monotonic() - self.first) / self.generated
        return min(most, int((1 - DELIVERY) * remaining / pace))

    @property
    def shortened(self) -> bool:
        """Whether it ended in time only because it was brought to an end."""
        return self.finish == "stop" and self.sampler is not None and self.sampler.shortened

    @property
    def over(self) -> bool:
        return self.finish is not None or self.request.error is not None

    @property
    def waits_for_prompt(self) -> bool:
        """Whether it has yet to begin, and another answer of its request is computing their prompt."""
        return not self.generated and any(
            other.sequence >= 0 and other.prefilling and not other.generated for other in self.request.answers
        )


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
    """The requests in one model's context, by their answers."""

    def __init__(
        self,
        model: llama.Model,
        context: llama.Context,
        tuning: BatchTuning,
        *,
        slots: int,
        cached_prompts: int,
        totals: ModelTotals,
        energy: Attribution,
        counters: Callable[[], Counters],
    ) -> None:
        """`context` holds `slots` + `cached_prompts` sequences; the latter keep ended requests' prompts. With
        none of them no prefixes are shared."""
        self.model, self.context = model, context
        self.tuning, self._totals, self._energy, self._counters = tuning, totals, energy, counters
        self.waiting: deque[Answer] = deque()
        self.active: list[Answer] = []  # oldest first
        self._slots, self._cached_prompts = slots, cached_prompts
        self._begin()

    def _begin(self) -> None:
        """An empty context's state."""
        slots = self._slots
        self._unused = list(range(slots))
        self._cells = KVCells(self.context.kv_tokens, slots)
        self._prefixes = PrefixCache(range(slots, slots + self._cached_prompts), self.context, self._cells)
        self._stepping: tuple[Answer, ...] = ()
        self._computing: tuple[Answer, ...] = ()

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
        return [answer.request for answer in self._computing or tuple(self.active)]

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
        if stepping and all(answer.request.stop.reason for answer in stepping):
            self.context.abort(True)

    def step(self) -> None:
        """Admit, plan, decode, sample. A request that fails ends with its error; the others go on."""
        for request in self._inside():
            if reason := request.stop.reason:
                for answer in request.answers:
                    answer.finish = answer.finish or reason
                self._end(request)
        self._admit()
        prefilling, decoding = self._ready()
        if not prefilling and not decoding:
            return
        began = time.monotonic()
        sequences, context = len(self.active), sum(self._cells.length(a.sequence) for a in self.active)
        for answer in prefilling:
            answer.request.began = answer.request.began or began
        groups = self._groups(prefilling, decoding)
        done = [part for group in groups for part in self._decode(group)]
        ended = time.monotonic()
        if not prefilling and len(done) == len(decoding):
            self.tuning.widths.observe(tuple(len(group) for group in groups), ended - began)
        if not done:
            return
        fresh = set(prefilling)
        prefilled = sum(tokens for answer, tokens in done if answer in fresh)
        self._totals.step(began, ended, sequences=sequences, prefilled=prefilled, context=context)
        expected = step_time(self.tuning.step_cost, sequences=sequences, prefilled=prefilled, context=context)
        if is_stall(ended - began, expected):
            for answer in self.active:
                answer.request.stalled = True
        work: dict[Request, float] = {}
        for answer, tokens in done:
            part = self.tuning.work(tokens, prefill=answer in fresh, decoding=len(decoding))
            work[answer.request] = work.get(answer.request, 0.0) + part
        self._energy.work({request: amount for request, amount in work.items() if request.in_batch})
        for request in work:
            self._end(request)

    def fail(self, error: EngineError) -> None:
        """End every request with `error` and begin anew, whatever the state: the engine itself failed, or closes."""
        for request in self._inside():
            with suppress(KeyError):
                self._energy.leave(request)
            request.error = error
            request.outbox.put(None)
        self.active.clear()
        self.waiting.clear()
        self.context.clear()
        self._begin()

    def _inside(self) -> list[Request]:
        """Every request, in the batch or waiting."""
        return list(dict.fromkeys(answer.request for answer in (*self.active, *self.waiting)))

    # --- admission

    def _admit(self) -> None:
        while (answer := self._next(shares=self._cached_prompts > 0)) is not None:
            self._enter(answer)
            answer.prefilling = True
            if self._cached_prompts:
                self._find_prefix(answer)

    def _next(self, *, shares: bool) -> Answer | None:
        """Who joins next: of those that wait, the first of the request with the fewest answers in the batch, so that
        one of many answers keeps nobody waiting for all of them. None without a sequence or cells for it. `shares`: it
        will share its prompt's cells with an answer of its request that has computed them."""
        able = [answer for answer in self.waiting if not answer.waits_for_prompt] if self._unused else []
        if not able:
            return None
        answer = min(able, key=lambda one: one.request.in_batch)
        shared = shares and any(o.sequence >= 0 and not o.prefilling for o in answer.request.answers)
        need = len(answer.tokens) - shared * len(answer.request.prompt) + HEADROOM * (len(self.active) + 1)
        return None if self.active and need > self.free_kv else answer

    def _enter(self, answer: Answer) -> None:
        request = answer.request
        self.waiting.remove(answer)
        if not request.in_batch:
            request.before = request.before or self._counters()
            self._energy.enter(request)
        answer.sequence = self._unused.pop()
        self.active.append(answer)

    def _fork(self, answer: Answer) -> list[Answer]:
        """Its prompt is computed, and no more: those of its request that waited for that begin here, too. Returns them.
        (Whole sequences can be copied in every kind of memory, parts of them not.)"""
        begun = []
        while (other := self._next(shares=True)) is not None and other.request is answer.request:
            if other.generated:
                break  # preempted, it must compute what it had
            self._enter(other)
            self.context.copy(answer.sequence, other.sequence, len(answer.tokens))
            self._cells.share(answer.sequence, other.sequence, len(answer.tokens))
            other.prefilling = False
            begun.append(other)
        return begun

    def _find_prefix(self, answer: Answer) -> None:
        """Share the longest prefix that another answer or a cached prompt has computed, or is computing."""
        if answer.request.scores_prompt:
            return
        source, shared = self._prefixes.longest_match(answer.tokens)
        if shared:
            self._prefixes.touch(source)
        computing = None
        for other in self.active:
            if other is answer:
                break  # only older ones: nobody waits in a circle
            common = common_prefix(other.tokens, answer.tokens)
            if common > shared:
                source, shared, computing = other.sequence, common, other
        shared = min(shared, len(answer.tokens) - 1)  # the last token's logits are needed
        if shared < SHORTEST:
            return
        if computing is not None and self._cells.length(computing.sequence) < shared:
            answer.prefix_of, answer.shared = computing, shared
            return
        self.context.copy(source, answer.sequence, shared)
        self._cells.share(source, answer.sequence, shared)
        request = answer.request
        if not request.generated:
            request.cached = max(request.cached, min(shared, len(request.prompt)))

    def _ready(self) -> tuple[list[Answer], list[Answer]]:
        """The answers to prefill and to decode in this step."""
        for answer in self.active:
            other = answer.prefix_of
            if other and (other.sequence < 0 or self._cells.length(other.sequence) >= answer.shared):
                answer.prefix_of = None
                self._find_prefix(answer)
        prefilling = [a for a in self.active if a.prefilling and a.prefix_of is None]
        return prefilling, [a for a in self.active if not a.prefilling]

    def _groups(self, prefilling: list[Answer], decoding: list[Answer]) -> list[list[tuple[Answer, int]]]:
        """The decodes of this step: (answer, tokens) each. Beside a prefill all go in one."""
        if prefilling:
            remaining = [len(a.tokens) - self._cells.length(a.sequence) for a in prefilling]
            remaining = [
                min(n, SCORED) if a.request.scores_prompt else n for a, n in zip(prefilling, remaining, strict=True)
            ]
            chunks = share_prefill(remaining, min(self.tuning.chunk, self.context.batch_tokens - len(decoding)))
            parts = [(a, n) for a, n in zip(prefilling, chunks, strict=True) if n]
            return [[*((a, 1) for a in decoding), *parts]]
        rest = iter(decoding)
        return [[(next(rest), 1) for _ in range(width)] for width in self.tuning.widths.choose(len(decoding))]

    # --- one decode

    def _decode(self, group: list[tuple[Answer, int]]) -> list[tuple[Answer, int]]:
        """Compute (answer, tokens) in one pass and sample. Returns those that were computed."""
        while True:
            group = [(a, n) for a, n in group if a.sequence >= 0]  # without the preempted
            if not group:
                return []
            if not self._make_room(sum(n for _, n in group)):
                continue
            rows = self._fill(group)
            self._stepping = self._computing = tuple(a for a, _ in group)
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
        for answer, tokens in group:
            self._cells.grow(answer.sequence, tokens)
        for (answer, tokens), row in zip(group, rows, strict=True):
            if answer.request.scores_prompt:
                self._score(answer, tokens, row)
            if answer.over or self._cells.length(answer.sequence) < len(answer.tokens):
                continue  # another answer of its request failed, or there is more to prefill
            answer.prefilling = False
            for each in (answer, *(() if answer.generated else self._fork(answer))):
                self._sample(each, row)
        return group

    def _fill(self, group: list[tuple[Answer, int]]) -> list[int]:
        """Fill the context's batch; returns the row of each one's last token."""
        rows = []
        self.context.begin()
        for answer, tokens in group:
            start = self._cells.length(answer.sequence)
            last = start + tokens == len(answer.tokens)
            part, every = answer.tokens[start : start + tokens], answer.request.scores_prompt
            rows.append(self.context.add(answer.sequence, start, part, output=last, every=every))
        return rows

    def _score(self, answer: Answer, tokens: int, row: int) -> None:
        """The log-probabilities of the prompt's tokens that come after each of the last `tokens`, up to `row`."""
        request, end = answer.request, self._cells.length(answer.sequence)
        known, top = request.prompt_logprobs, request.spec.logprobs or 0
        if not known:
            known.append(first_logprobs(self.model, request.prompt[0]))
        for position in range(max(len(known), end - tokens + 1), min(end + 1, len(request.prompt))):
            logits = self.context.logits(row - (end - position))
            known.append(token_logprobs(self.model, logits, request.prompt[position], top))

    def _lose(self, group: list[tuple[Answer, int]], status: int) -> None:
        """llama.cpp failed: what it left in memory for these requests is unknown."""
        reason = f"llama.cpp could not compute the batch (status {status}): {llama.last_error()}"
        log.error("decode_failed", status=status, answers=len(group))
        for answer, _ in group:
            answer.request.error = EngineError(reason, retry=True)
            self._end(answer.request, cache=False)

    def _make_room(self, cells: int) -> bool:
        """Whether so many cells are free, after evicting cached prompts; otherwise preempts one answer."""
        while self._cells.free < cells and self._prefixes.evict_oldest():
            pass
        if self._cells.free >= cells:
            return True
        self._preempt()
        return False

    def _preempt(self) -> None:
        """KV cache full: put the youngest answer of the request of least value per work back into the queue. Its output
        so far is kept, and prefilled again when it returns."""
        if self._prefixes.evict_oldest():
            return
        victim = self.active[choose_victim([(a.request.spec.value, a.request.work) for a in self.active])]
        if len(self.active) == 1:
            victim.request.error = EngineError(
                f"{len(victim.tokens)} tokens do not fit into the KV cache of {self.context.kv_tokens}", retry=False
            )
            self._end(victim.request, cache=False)
            return
        log.debug(
            "answer_preempted", task_id=victim.request.task_id, tokens=len(victim.tokens), active=len(self.active)
        )
        self._leave(victim)
        self.waiting.appendleft(victim)

    def _sample(self, answer: Answer, row: int) -> None:
        """The next token of an answer. Its failure is its request's, and must not take others with it."""
        request = answer.request
        self._computing = (answer,)
        try:
            logits = self.context.logits(row)
            token = int(logits.argmax()) if answer.sampler is None else answer.sampler.sample(logits, answer.reach)
            self._take(answer, token, logits)
        except GrammarError as error:
            request.error = EngineError(f"{constraint(request.spec)}: {error}", retry=False)
        except Exception as error:
            log.exception("sampling_failed", task_id=request.task_id)
            request.error = EngineError(f"sampling failed: {type(error).__name__}: {error}", retry=True)
        self._computing = ()

    def _take(self, answer: Answer, token: int, logits: llama.Logits) -> None:
        """One more token of an answer, drawn from `logits`."""
        spec, now = answer.request.spec, time.monotonic()
        answer.first = answer.first or now
        answer.last = now
        self._totals.generated()
        if self.model.ends(token):
            answer.finish = "stop"
            return
        if spec.logprobs is not None:
            entry = token_logprobs(self.model, logits, token, spec.logprobs)
            answer.logprobs.append((answer.text.length, entry))
        answer.tokens.append(token)
        self._say(answer, answer.text.take(token, self.model.piece(token)))
        if answer.text.stopped:
            answer.finish = "stop"
        elif answer.generated == spec.max_tokens:
            answer.finish = "length"

    @staticmethod
    def _say(answer: Answer, deltas: list[Delta]) -> None:
        if answer.request.streams:
            for delta in deltas:
                answer.request.outbox.put(delta)

    # --- leaving

    def _leave(self, answer: Answer) -> None:
        """Take an answer out of the batch and free its KV cells."""
        request = answer.request
        self.active.remove(answer)
        self.context.remove(answer.sequence)
        self._cells.drop(answer.sequence)
        self._unused.append(answer.sequence)
        answer.sequence, answer.prefix_of = -1, None
        if not request.in_batch:
            used = self._energy.leave(request)
            request.inference += used.inference
            request.idle += used.idle

    def _end(self, request: Request, *, cache: bool = True) -> None:
        """Free what those of its answers hold that are over; with the last of them, notify its caller."""
        over = [answer for answer in request.answers if answer.over and not answer.ended]
        for answer in over:
            answer.ended = True
            if answer.sequence >= 0:
                if cache and self._cached_prompts and not answer.prefilling:
                    self._prefixes.insert(answer.sequence, request.prompt)
                self._leave(answer)
                self._prefixes.trim()
            else:
                self.waiting.remove(answer)
            if answer.sampler is not None:
                answer.sampler.close()
            self._say(answer, answer.text.finish(cut=answer.finish != "stop"))
        if over and all(answer.ended for answer in request.answers):
            request.after = self._counters()
            request.outbox.put(None)
