"""An OpenAI-compatible server as this node's engine.

Every request is a stream of its own, so that progress shows and a cancel closes it. How the server batches is its own
affair: each token of each request counts as a step of one sequence. Energy is not measured but priced, and says so.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import aclosing
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal
from urllib.parse import urlsplit

import structlog

from perllm.broker.capabilities import OF_KIND, Capability
from perllm.broker.engine.answers import answer_seed
from perllm.broker.engine.checks import check_echo, check_kind, check_model
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
from perllm.broker.engine.embedding import Vector, check_dimensions, made_of
from perllm.broker.engine.text import chat_messages, openai_tool
from perllm.broker.engine.totals import EngineTotals
from perllm.broker.errors import BadSetting
from perllm.broker.messages import (
    BYTES_PER_TOKEN,
    Counters,
    Delta,
    Energy,
    ModelOffer,
    Output,
    Power,
    StepCost,
    TaskSpec,
)
from perllm.cloud_worker import remote_embedding
from perllm.cloud_worker.backoff import backoff
from perllm.cloud_worker.event_loop import LoopThread, Pieces
from perllm.cloud_worker.openai_api import (
    Chunk,
    ChunkDelta,
    Malformed,
    OpenAIClient,
    Refused,
    ServerError,
    Unavailable,
    Unreachable,
    Usage,
)
from perllm.cloud_worker.remote_answer import RemoteAnswer
from perllm.cloud_worker.remote_capabilities import look
from perllm.cloud_worker.remote_embedding import Pooling
from perllm.cloud_worker.settings import CloudSettings

log = structlog.get_logger(__name__)

METHOD = "remote-price"
#: Requests at once unless set.
DEFAULT_SLOTS = 16
#: Tokens of context assumed where neither the server nor PERLLM_CONTEXT gives it.
DEFAULT_CONTEXT = 8192
#: How often a request is tried while the server is overloaded or away, and the longest pause between, s.
MAX_TRIES, MAX_PAUSE = 5, 60.0
#: Seconds between two polls of `Stop` while the server is silent.
STOP_POLL = 0.05
#: Words of the two prompts the server is calibrated with, and the words (about a token each).
PROBES = (10, 300)
WORDS = ("sun", "tree", "river", "stone", "cloud", "bird", "house", "road", "night", "light", "water", "wind")


class _Answer(RemoteAnswer):
    """One answer to a task. Times are `time.monotonic()`."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.first: float | None = None
        self.last: float | None = None
        self.logprobs: list[dict[str, Any]] = []


@dataclass(slots=True, eq=False)
class _Asked:
    """One request to the server, and the answers it gave."""

    answers: list[_Answer] = field(default_factory=list)
    usage: Usage | None = None

    @property
    def tokens(self) -> int:
        """Of its answers, as the server counted them, or seen."""
        return (self.usage.completion_tokens if self.usage else 0) or sum(answer.tokens for answer in self.answers)

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that are thoughts, as the server counted them, or seen."""
        details = self.usage.completion_tokens_details if self.usage else None
        counted = details.reasoning_tokens if details is not None else None
        return sum(answer.reasoning_tokens for answer in self.answers) if counted is None else counted


@dataclass(slots=True, eq=False)
class _Request:
    """One call of `generate`. Times are `time.monotonic()`."""

    task_id: str
    spec: TaskSpec
    stop: Stop
    pieces: Pieces | None = None  # where text goes as it comes
    accepted: float = field(default_factory=time.monotonic)
    sent: float | None = None
    limited: bool = True  # the server is told how many tokens at most
    answers: list[_Answer] = field(init=False)
    asked: list[_Asked] = field(default_factory=list)  # what is to be paid
    vectors: list[Vector] = field(default_factory=list)  # of the first inputs of an embedding or rerank task

    def __post_init__(self) -> None:
        self.answers = [_Answer(index) for index in range(self.spec.n)]

    @property
    def tokens(self) -> int:
        """Of all answers so far."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def first(self) -> float | None:
        return min((answer.first for answer in self.answers if answer.first), default=None)

    @property
    def last(self) -> float | None:
        return max((answer.last for answer in self.answers if answer.last), default=None)

    @property
    def echo(self) -> str:
        """What the text of each answer begins with; where its prompt is token ids, the server knows their text."""
        return self.spec.prompt or "" if self.spec.echo else ""

    def say(self, deltas: Iterable[Delta]) -> None:
        if self.pieces is not None:
            for delta in deltas:
                self.pieces.put(delta)


@dataclass(frozen=True, slots=True)
class _Arm:
    """What the server is used for under one name."""

    name: str
    capabilities: tuple[Capability, ...]
    step_cost: StepCost
    watts: float  # what its tokens' price comes to while it works
    width: int | None = None  # of its embeddings


class RemoteEngine:
    """See the module's head. `first_pause` is that after a failure, s; pauses double from try to try."""

    def __init__(self, settings: CloudSettings, *, first_pause: float = 0.5) -> None:
        self._settings, self._first_pause = settings, first_pause
        self._url = _checked_url(settings.openai_base_url)
        if settings.openai_joules_per_token is None:
            raise BadSetting(
                "set PERLLM_OPENAI_JOULES_PER_TOKEN: a remote server's energy cannot be measured, and what counts as "
                "free would get all the work (an H200 was measured at 0.07 to 9 J per token, by batch and model)"
            )
        self._price = settings.openai_joules_per_token
        self.slots = settings.slots or DEFAULT_SLOTS
        self.description = f"OpenAI-compatible server at {self._url}, not started"
        # What servers differ in, learned from what they refuse:
        self._limit = "max_tokens"  # newer OpenAI models call it max_completion_tokens
        self._own_schema = False  # llama-cpp-python's server has a form of its own for JSON schemas
        self._several = True  # it gives several answers to one request
        self._tells_thoughts = True  # what the model thought in earlier turns: not every server takes it
        self._arms: tuple[_Arm, ...] = ()
        self._totals = EngineTotals()
        self._joules = 0.0
        self._requests: dict[_Request, None] = {}
        self._open_at = 0.0  # the server asked not to be asked before
        self._down: str | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._loop: LoopThread | None = None
        self._client = OpenAIClient(self._url, _key(settings), timeout=settings.openai_timeout, connections=self.slots)

    # --- life

    def start(self) -> None:
        """Find the model on the server and calibrate (a few seconds). Raises BadSetting with what to change."""
        self._loop = LoopThread("perllm-remote")
        try:
            self._loop.run(self._start())
        except ServerError as error:
            raise BadSetting(self._explained(error)) from None
        except EngineError as error:
            raise BadSetting(str(error)) from None
        self.description = f"OpenAI-compatible server at {self._url}, {self._model}"

    async def _start(self) -> None:
        self._model, self._context = await self._find_model()
        name = self._settings.model_name or _producer_name(self._model)
        pooling = await remote_embedding.look(self._post)
        chat = await self._chat_arm(name, needed=not pooling.capabilities)
        self._arms = (chat,) if chat is not None else ()
        if pooling.capabilities and (pooled := await self._pooled_arm(name, pooling, beside=chat)) is not None:
            self._arms += (pooled,)
        for arm in self._arms:
            log.info("remote_found", model=arm.name, capabilities=", ".join(arm.capabilities))
        self._totals = EngineTotals()  # calibration is no task
        self._joules = 0.0

    async def _chat_arm(self, name: str, *, needed: bool) -> _Arm | None:
        """The server as one that chats; None where it does not, and need not. Raises ServerError, EngineError."""
        try:
            step_cost = await self._calibrate()
        except (ServerError, EngineError) as error:
            if needed:
                raise
            log.info("remote_chats_not", model=name, reason=str(error))
            return None
        found = await look(self._post, self._limit)
        self._own_schema = found.own_schema
        watts = self._price / step_cost.step if step_cost.step else 0.0
        return _Arm(name, found.capabilities, step_cost, watts)

    async def _pooled_arm(self, name: str, pooling: Pooling, *, beside: _Arm | None) -> _Arm | None:
        """The server as one that embeds or reranks. Raises ServerError, EngineError, BadSetting."""
        if not self._settings.openai_joules_per_prompt_token:
            hint = "set PERLLM_OPENAI_JOULES_PER_PROMPT_TOKEN: what embeds generates nothing, and would cost nothing"
            if beside is None:
                raise BadSetting(hint)
            log.info("remote_embeds_not", model=name, hint=hint)
            return None
        kind: Literal["embed", "rerank"] = "embed" if Capability.EMBEDDINGS in pooling.capabilities else "rerank"
        await self._pooled_probe(kind, PROBES[0])
        short, long = await self._pooled_probe(kind, PROBES[0]), await self._longest_probe(kind)
        more_tokens = max(1, _prompt_tokens(long) - _prompt_tokens(short))
        prefill = max(0.0, _latency(long) - _latency(short)) / more_tokens
        cost = StepCost(step=_latency(short), sequence=0.0, prefill=prefill)
        own = name if beside is None else f"{name}:embed"
        price = self._settings.openai_joules_per_prompt_token
        watts = price * _prompt_tokens(long) / max(_latency(long), 1e-9)
        return _Arm(own, pooling.capabilities, cost, watts, pooling.width)

    async def _longest_probe(self, kind: Literal["embed", "rerank"]) -> _Request:
        """The longer of the two, as long as the model takes it."""
        words = PROBES[1]
        while True:
            try:
                return await self._pooled_probe(kind, words)
            except EngineError:
                words //= 2
                if words <= PROBES[0]:
                    raise

    async def _pooled_probe(self, kind: Literal["embed", "rerank"], words: int) -> _Request:
        text = " ".join(random.choices(WORDS, k=words))
        spec = TaskSpec(kind=kind, inputs=(text,), query="a" if kind == "rerank" else None)
        request = _Request("calibration", spec, Stop(self._settings.openai_timeout))
        await self._ask(request)
        return request

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask once more where the server only fails for a moment. Raises ServerError."""
        try:
            return await self._post_once(path, body)
        except Unavailable as error:
            await asyncio.sleep(min(MAX_PAUSE, error.wait if error.wait is not None else self._first_pause))
            return await self._post_once(path, body)

    async def _post_once(self, path: str, body: dict[str, Any]) -> Any:
        return await self._client.post(path, {"model": self._model, **body})

    async def _find_model(self) -> tuple[str, int]:
        """(the model's name there, its context in tokens)."""
        wanted, context = self._settings.model, self._settings.context
        try:
            offered = {model.id: model for model in await self._client.models()}
        except Refused as error:
            if error.status in (401, 403) or wanted is None:
                raise
            return wanted, context or DEFAULT_CONTEXT  # a server without a list
        names = ", ".join(sorted(offered)[:20]) or "none"
        if wanted is None:
            if len(offered) != 1:
                raise BadSetting(f"set PERLLM_MODEL to one of the models {self._url} offers: {names}")
            wanted = next(iter(offered))
        if wanted not in offered:
            raise BadSetting(f"PERLLM_MODEL: {self._url} does not offer {wanted!r}, but: {names}")
        return wanted, context or offered[wanted].max_model_len or DEFAULT_CONTEXT

    async def _calibrate(self) -> StepCost:
        """Time a short prompt and a long one. Network and queue are in the times, as they will be in the tasks'."""
        await self._probe(PROBES[0])  # the first one wakes the server up
        short, long = [await self._probe(words) for words in PROBES]
        more_tokens = max(1, _prompt_tokens(long) - _prompt_tokens(short))
        return StepCost(
            step=_token_interval(short),
            sequence=0.0,
            prefill=max(0.0, _latency(long) - _latency(short)) / more_tokens,
        )

    async def _probe(self, words: int) -> _Request:
        prompt = " ".join(random.choices(WORDS, k=words))  # another each time, which no cache knows
        spec = TaskSpec(prompt=prompt, max_tokens=16 if words == min(PROBES) else 1)
        request = _Request("calibration", spec, Stop(self._settings.openai_timeout))
        await self._ask(request)
        return request

    def _explained(self, error: ServerError) -> str:
        match error:
            case Refused(status=401 | 403):
                return f"{self._url} refuses the key ({error}): set PERLLM_OPENAI_API_KEY or PERLLM_OPENAI_API_KEY_FILE"
            case Refused() | Malformed():
                return f"PERLLM_OPENAI_BASE_URL: {self._url} does not answer as an OpenAI-compatible server: {error}"
            case _:
                return f"PERLLM_OPENAI_BASE_URL: {self._url}: {error}"

    def close(self) -> None:
        """Stop every generation. Idempotent."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close(self._client.close())

    # --- what the worker asks

    def offers(self) -> tuple[ModelOffer, ...]:
        """The model served, with the step cost measured at the start; under a name of its own as one that embeds, if it
        chats as well."""
        return tuple(
            ModelOffer(
                name=arm.name,
                context=self._context,
                kv_tokens=self._context * self.slots,
                calibration=arm.step_cost,
                capabilities=arm.capabilities,
                dimensions=arm.width,
            )
            for arm in self._arms
        )

    def power(self) -> Power:
        """The price, as the watts one request's tokens come to."""
        return Power(
            idle=0.0,
            active=self._arms[0].watts,
            joules_per_byte=self._settings.joules_per_byte,
            method=METHOD,
            estimated=True,
        )

    def counters(self) -> Counters:
        """Totals since `start` and the present state. Raises EngineDown while the server cannot be used."""
        if self._down is not None:
            raise EngineDown(self._down, inside=False)
        active = len(self._requests)
        return self._totals.counters(
            active=active, free_kv=self._context * max(0, self.slots - active), energy=self._joules
        )

    def progress(self) -> Mapping[str, int]:
        """Task id → tokens generated so far."""
        return {request.task_id: request.tokens for request in list(self._requests)}

    def stuck(self) -> Stuck | None:
        """Never: every request has its time-outs."""
        return None

    # --- one request

    def generate(self, task_id: str, spec: TaskSpec, stop: Stop, on_delta: OnDelta | None = None) -> Generation:
        """Run one task to its end or until `stop`. Raises EngineError."""
        arm = self._arm(spec)
        check_echo(spec, as_it_is=False)
        loop = self._loop
        if loop is None:
            raise EngineError("the engine is closed", retry=True)
        try:
            if on_delta is None:
                return loop.run(self._generate(_Request(task_id, spec, stop), arm))
            pieces: Pieces = SimpleQueue()
            going_on = self._generate(_Request(task_id, spec, stop, pieces), arm)
            return loop.run_streaming(going_on, pieces, on_delta, stop)
        except CancelledError:
            raise EngineError("the engine is closing", retry=True) from None

    def _arm(self, spec: TaskSpec) -> _Arm:
        """The one a task is for. Raises EngineError."""
        check_model(spec.model, [arm.name for arm in self._arms])
        able = [arm for arm in self._arms if OF_KIND[spec.kind] in arm.capabilities]
        named = [arm for arm in self._arms if arm.name == spec.model] or able or self._arms
        check_kind(spec.kind, named[0].name, named[0].capabilities)
        return named[0]

    async def _generate(self, request: _Request, arm: _Arm) -> Generation:
        before = self.counters()  # raises EngineDown
        if not self._requests:
            self._totals.last_progress = time.monotonic()
        self._requests[request] = None
        if request.echo:
            request.say(Delta(index=answer.index, text=request.echo) for answer in request.answers)
        asking = asyncio.ensure_future(self._ask(request))
        try:
            while not asking.done():
                remaining = request.stop.remaining
                await asyncio.wait(
                    {asking}, timeout=STOP_POLL if remaining is None else min(STOP_POLL, remaining + 0.001)
                )
                if request.stop.reason is not None:
                    asking.cancel()
            if not asking.cancelled():
                asking.result()
        finally:
            asking.cancel()
            del self._requests[request]
        return self._generation(request, arm, before)

    @staticmethod
    def _finish(request: _Request, answer: _Answer) -> FinishReason:
        match answer.finish:
            case None:
                assert request.stop.reason is not None
                return request.stop.reason
            case "length":
                return "length"
            case "content_filter":
                raise EngineError("the server's content filter stopped it", retry=False)
            case _:
                return "tool_calls" if answer.called else "stop"

    def _generation(self, request: _Request, arm: _Arm, before: Counters) -> Generation:
        seen, prompt = request.tokens, _prompt_tokens(request)
        tokens = sum(asked.tokens for asked in request.asked)
        for asked in request.asked:
            _share(asked.tokens, asked.answers)
        usage = request.asked[0].usage if request.asked else None
        cached = (usage.prompt_tokens_details.cached_tokens or 0) if usage and usage.prompt_tokens_details else 0
        prompts = prompt * len(request.asked)  # it is paid for each time; if it was never sent, not at all
        joules = prompts * self._settings.openai_joules_per_prompt_token + tokens * self._price
        self._joules += joules
        if request.spec.kind == "generate":  # otherwise they are counted as they are answered
            self._totals.prefilled += max(0, prompts - cached)
        self._totals.generated += tokens - seen
        now = time.monotonic()
        sent, first, last = request.sent or now, request.first or now, request.last
        head, *more = [
            {
                "text": request.echo + answer.text,
                "finish_reason": self._finish(request, answer),
                "reasoning": answer.reasoning,
                "tool_calls": answer.calls,
                "logprobs": answer.logprobs if request.spec.logprobs is not None else None,
                "tokens": answer.tokens,
            }
            for answer in request.answers
        ]
        pooled = request.vectors and head["finish_reason"] == "stop"
        made = made_of(request.vectors, request.spec) if pooled else {}
        return Generation(
            output=Output.model_validate({**head, "more": more, **made}),
            model=arm.name,
            prompt_tokens=prompt if request.asked else 0,
            completion_tokens=tokens,
            wait=sent - request.accepted,
            prefill=max(0.0, first - sent),
            decode=last - first if request.first and last else 0.0,
            energy=Energy(inference=joules, method=METHOD, estimated=True),
            before=before,
            after=counters_or_none(self),
            reasoning_tokens=sum(asked.reasoning_tokens for asked in request.asked),
            cached_tokens=cached,
        )

    async def _ask(self, request: _Request) -> None:
        """Ask for all its answers: together, or one by one of a server that refuses to give several, or gives fewer.
        Raises EngineError."""
        if len(request.answers) > 1 and self._several:
            await self._ask_for(request, request.answers)
            if missing := [answer for answer in request.answers if answer.finish is None]:
                await self._ask_for(request, missing[:1])  # if this is refused, it was not for their number
                log.info("remote_gives_one_answer", server=self._url)
                self._several = False
        await _all([self._ask_for(request, [answer]) for answer in request.answers if answer.finish is None])

    async def _ask_for(self, request: _Request, answers: list[_Answer]) -> None:
        """Ask, and ask again after a pause while the server fails. Of several answers some, or all, may then be
        missing. Raises EngineError."""
        tries = 0
        while True:
            await self._wait_until_open()
            try:
                await (self._stream(request, answers) if request.spec.kind == "generate" else self._pool(request))
            except ServerError as error:
                if self._adapt(str(error), request.spec) or _without_limit(error, request):
                    continue
                if isinstance(error, Refused) and len(answers) > 1 and error.status not in (401, 403):
                    return
                tries += 1
                pause = self._pause(request, answers, error, tries)
                log.info("remote_unavailable", reason=str(error), pause=round(pause, 2), tries=tries)
                await asyncio.sleep(pause)
            else:
                return

    def _adapt(self, error: str, spec: TaskSpec) -> bool:
        """Whether the server refuses one form of a request of which it may know another: that is used from now on."""
        if "max_completion_tokens" in error and self._limit == "max_tokens":
            self._limit = "max_completion_tokens"
            return True
        if "response_format" in error and spec.json_schema is not None and not self._own_schema:
            self._own_schema = True
            return True
        if "reasoning_content" in error and self._tells_thoughts:
            self._tells_thoughts = False
            return True
        return False

    def _pause(self, request: _Request, answers: list[_Answer], error: ServerError, tries: int) -> float:
        """Seconds to wait before it is asked again. Raises EngineError where that is of no use."""
        match error:
            case Unreachable():
                raise self._go_down(f"{self._url}: {error}") from None
            case Refused(status=401 | 403):
                raise self._go_down(self._explained(error)) from None
            case Refused():
                raise EngineError(f"the server refuses it: {error}", retry=False) from None
            case Unavailable() if tries < MAX_TRIES and not any(answer.tokens for answer in answers):
                pause = backoff(tries, first=self._first_pause, longest=MAX_PAUSE) if error.wait is None else error.wait
                remaining = request.stop.remaining
                if remaining is None or pause < remaining:
                    if error.wait is not None:
                        self._open_at = max(self._open_at, time.monotonic() + pause)  # it asks this of everybody
                    return pause
        after = f" after {request.tokens} tokens" if request.tokens else ""
        raise EngineError(f"{self._url}{after}: {error}", retry=True) from None

    async def _wait_until_open(self) -> None:
        """Nobody asks the server while it wants a pause; afterwards they do not all ask at once."""
        while (pause := self._open_at - time.monotonic()) > 0:
            await asyncio.sleep(pause * random.uniform(1.0, 1.1))

    async def _pool(self, request: _Request) -> None:
        """The inputs of an embedding or rerank task, some at a time: fewer where the server refuses so many. Raises
        ServerError, EngineError."""
        spec, (answer,), most = request.spec, request.answers, remote_embedding.MOST_INPUTS
        inputs: Sequence[Any] = spec.inputs or spec.input_ids
        request.sent = request.sent or time.monotonic()
        if not request.asked:
            request.asked.append(_Asked([answer]))
        (asked,) = request.asked
        while (done := len(request.vectors)) < len(inputs):
            some = inputs[done : done + most]
            began = time.monotonic()
            try:
                pooled = await remote_embedding.pool(self._post_once, spec, some)
            except Refused as error:
                if error.status in (401, 403, 404):
                    raise
                if len(some) == 1:
                    raise EngineError(f"input {done}: the server refuses it: {error}", retry=False) from None
                most = max(1, len(some) // 4)
                continue
            request.vectors += pooled.vectors
            tokens = pooled.tokens or sum(map(_size, some)) // BYTES_PER_TOKEN + 1
            so_far = asked.usage.prompt_tokens if asked.usage is not None else 0
            asked.usage = Usage(prompt_tokens=so_far + tokens)
            answer.first = answer.last = time.monotonic()
            self._totals.step(began, answer.last, sequences=1, prefilled=tokens, context=0)
        if any(len(vector) != len(request.vectors[0]) for vector in request.vectors):
            raise Malformed("its vectors are of several lengths")
        check_dimensions(spec.dimensions, len(request.vectors[0]))
        answer.finish = "stop"

    async def _stream(self, request: _Request, answers: list[_Answer]) -> None:
        """One stream, to its end. Raises ServerError."""
        now = time.monotonic()
        request.sent = request.sent or now
        for answer in answers:
            answer.last = now
        asked = _Asked()
        request.asked.append(asked)
        path, body = self._body(request, answers)
        try:
            async with aclosing(self._client.complete(path, body)) as chunks:
                async for chunk in chunks:
                    self._take(request, asked, answers, chunk)
                    if not request.limited and all(a.finish or a.tokens >= request.spec.max_tokens for a in answers):
                        for answer in answers:
                            answer.finish = answer.finish or "length"
                        break
        except ServerError:
            if not asked.tokens:
                request.asked.remove(asked)
            if any(answer.finish is None for answer in answers):
                raise
        if not asked.answers or any(answer.finish is None for answer in asked.answers):
            raise Malformed("the stream broke off before it was finished")

    def _take(self, request: _Request, asked: _Asked, answers: list[_Answer], chunk: Chunk) -> None:
        asked.usage = chunk.usage or asked.usage
        for choice in chunk.choices if len(answers) > 1 else chunk.choices[:1]:
            if len(answers) > 1 and not 0 <= choice.index < len(answers):
                raise Malformed(f"it sent choice {choice.index} of {len(answers)}")
            answer = answers[choice.index if len(answers) > 1 else 0]
            if answer not in asked.answers:
                asked.answers.append(answer)
            entries = choice.logprobs.entries() if choice.logprobs else []
            answer.logprobs += entries
            tokens = max(1, len(entries))
            delta = choice.delta if choice.text is None else ChunkDelta(content=choice.text)
            if deltas := answer.take(delta, tokens):
                now = time.monotonic()
                assert answer.last is not None
                self._totals.step(answer.last, now, sequences=1, prefilled=0, context=0)
                self._totals.generated += tokens
                answer.first = answer.first or now
                answer.last = now
                request.say(deltas)
            if choice.finish_reason:
                answer.finish = choice.finish_reason
                request.say(answer.close())

    def _body(self, request: _Request, answers: list[_Answer]) -> tuple[str, dict[str, Any]]:
        """The endpoint and the request. What not every server knows is sent only where it is asked for."""
        spec = request.spec
        body: dict[str, Any] = {
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": spec.temperature,
        }
        neutral = TaskSpec(prompt="-")
        for ours in ("top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "top_k", "min_p", "grammar"):
            if (value := getattr(spec, ours)) != getattr(neutral, ours):
                body[ours] = value
        if spec.repeat_penalty != neutral.repeat_penalty:
            body["repeat_penalty"] = body["repetition_penalty"] = spec.repeat_penalty  # llama.cpp's name, vLLM's
        if spec.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in spec.logit_bias.items()}
        if len(answers) > 1:
            body["n"] = len(answers)
        elif spec.seed is not None:
            body["seed"] = answer_seed(spec.seed, answers[0].index)
        if spec.json_schema is not None:
            schema = {"name": "answer", "schema": spec.json_schema, "strict": True}
            standard = {"type": "json_schema", "json_schema": schema}
            body["response_format"] = (
                {"type": "json_object", "schema": spec.json_schema} if self._own_schema else standard
            )
        if spec.prompt_ids is not None or spec.suffix is not None:  # a chat takes neither
            body["prompt"] = list(spec.prompt_ids) if spec.prompt_ids is not None else spec.prompt
            if request.limited:
                body["max_tokens"] = self._most_tokens(spec)
            if spec.suffix is not None:
                body["suffix"] = spec.suffix
            elif spec.echo:
                body["echo"] = True
            if spec.logprobs is not None:
                body["logprobs"] = spec.logprobs
            return "completions", body
        body["messages"] = self._messages(spec)
        if request.limited:
            body[self._limit] = self._most_tokens(spec)
        if spec.logprobs is not None:
            body["logprobs"], body["top_logprobs"] = True, spec.logprobs
        if spec.offered_tools:
            body["tools"] = [openai_tool(tool) for tool in spec.offered_tools]
            if spec.tool_choice != "auto":
                body["tool_choice"] = spec.tool_choice
            if not spec.parallel_tool_calls:
                body["parallel_tool_calls"] = False
        if spec.reasoning_effort is not None:
            body["reasoning_effort"] = spec.reasoning_effort
        if spec.chat_template_kwargs:
            body["chat_template_kwargs"] = spec.chat_template_kwargs
        return "chat/completions", body

    def _most_tokens(self, spec: TaskSpec) -> int:
        """The limit to send: where the task's producer gave none, what the context has room for by our estimate of the
        prompt."""
        if not spec.fit_context:
            return spec.max_tokens
        return max(1, min(spec.max_tokens, self._context - spec.text_bytes() // BYTES_PER_TOKEN - 1))

    def _messages(self, spec: TaskSpec) -> list[dict[str, Any]]:
        messages = chat_messages(spec)
        if not self._tells_thoughts:
            for message in messages:
                message.pop("reasoning_content", None)
        return messages

    # --- when the server is away

    def _go_down(self, reason: str) -> EngineDown:
        """The server cannot be used at all: leave the cluster, and poll it until it is back."""
        if self._down is None:
            self._down = reason
            log.error("remote_down", reason=reason)
            self._reviving = asyncio.ensure_future(self._revive())
        return EngineDown(reason, inside=False)

    async def _revive(self) -> None:
        for tries in itertools.count(1):
            await asyncio.sleep(backoff(tries, first=self._first_pause, longest=MAX_PAUSE))
            try:
                await self._client.models()
            except Refused as error:
                if error.status in (401, 403):
                    continue
            except ServerError:
                continue
            self._down = None
            log.info("remote_back")
            return


def _without_limit(error: ServerError, request: _Request) -> bool:
    """Whether the server refuses so many tokens though the answer may be shorter: then it gets no limit."""
    about_length = re.search(r"context|max_(?:completion_)?tokens|too (?:large|long)", str(error)) is not None
    if not (isinstance(error, Refused) and about_length and request.spec.fit_context and request.limited):
        return False
    request.limited = False
    return True


async def _all(doing: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; what fails first ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in doing:
                group.create_task(each)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _share(tokens: int, answers: list[_Answer]) -> None:
    """What a server counted of several answers together, as each one's: in proportion to what was seen of it."""
    seen, left = sum(answer.tokens for answer in answers), tokens
    for answer in answers[:-1]:
        answer.tokens = answer.tokens * tokens // max(1, seen)
        left -= answer.tokens
    if answers:
        answers[-1].tokens = left


def _size(given: Any) -> int:
    """Bytes of an input, or of a text with so many tokens, about."""
    return len(given.encode(errors="replace")) if isinstance(given, str) else BYTES_PER_TOKEN * len(given)


def _latency(request: _Request) -> float:
    """Seconds to the first token (to the end, where there was none)."""
    return (request.first or request.last or 0.0) - (request.sent or 0.0)


def _token_interval(request: _Request) -> float:
    """Mean seconds from token to token."""
    if request.tokens > 1 and request.first and request.last:
        return (request.last - request.first) / (request.tokens - 1)
    return _latency(request)


def _prompt_tokens(request: _Request) -> int:
    """As the server counted them, or about."""
    usages = [asked.usage for asked in request.asked if asked.usage is not None]
    if usages and usages[0].prompt_tokens:
        return usages[0].prompt_tokens
    return request.spec.text_bytes() // BYTES_PER_TOKEN + 1


def _checked_url(url: str | None) -> str:
    if url is None:
        raise BadSetting("PERLLM_ENGINE=openai needs PERLLM_OPENAI_BASE_URL, e.g. http://localhost:8000/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise BadSetting("PERLLM_OPENAI_BASE_URL: must be http://host[:port]/… or https://…, without a password in it")
    return url.rstrip("/")


def _key(settings: CloudSettings) -> str | None:
    path = settings.openai_api_key_file
    if settings.openai_api_key is not None:
        key = settings.openai_api_key.get_secret_value()
    elif path is not None:
        try:
            key = path.expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadSetting(f"PERLLM_OPENAI_API_KEY_FILE: cannot read {path}: {error}") from None
    else:
        return None
    if not key or not key.isascii() or not key.isprintable():
        where = "PERLLM_OPENAI_API_KEY" if settings.openai_api_key is not None else str(path)
        raise BadSetting(f"{where}: holds no key (one line of printable characters)")
    return key


def _producer_name(model: str) -> str:
    """The server's name for a model as producers may write it (a path becomes its last part)."""
    return (
        re.sub(r"[^A-Za-z0-9._:/@+-]+", "-", model.rstrip("/").removesuffix(".gguf").rpartition("/")[2]).strip("-")
        or "model"
    )
