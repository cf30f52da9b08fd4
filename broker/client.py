"""For producers: submit tasks, wait for their results, cancel and explain them.

from perllm import Client

with Client() as client:
    task = client.submit("Why is the sky blue?", deadline=20, max_tokens=64)
    print(task.result(timeout=30).text)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar, Unpack

from perllm.broker import grammar
from perllm.broker.announcements import Announcements, ThreadedAnnouncements
from perllm.broker.connection import LOOK_TIMEOUT, REPLY_TIMEOUT
from perllm.broker.errors import (
    InvalidTask,
    TaskExpired,
    TaskFailed,
    TaskNotFound,
    TaskRejected,
    Unreachable,
    WaitTimeout,
)
from perllm.broker.ledger import Ledger, TaskRecord
from perllm.broker.messages import MAX_VALUE, Delta, Explanation, Result, State, TaskFields, TaskSpec, new_id
from perllm.broker.validation import TaskValidator

if TYPE_CHECKING:  # loaded when settings are read: half of what importing a client would take
    from perllm.broker.settings import Settings

#: Seconds after which a waiter looks for itself, in case an announcement was lost with a connection.
LOOK_EVERY = 2.0
#: Seconds a server that has answered before may be away while its answer is waited for, and between looks meanwhile
#: (drawn at random, so that not all waiters come back at once).
OUTAGE = 60.0
OUTAGE_LOOKS = (0.2, 1.0)
#: Seconds after a deadline at which who waits ends what is overdue himself, as nobody else seems to be there to do so;
#: and for which a server that does not answer is then asked.
OVERDUE, OVERDUE_OUTAGE = 0.6, 2.0
#: Ids per look.
_CHUNK = 1000
#: Ids named where several begin alike.
_AMBIGUOUS = 5
#: Threads of an AsyncClient.
_THREADS = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Handle:
    """One submitted task."""

    id: str
    _client: Client

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the final state and return it, whichever it is. Raises WaitTimeout, TaskNotFound."""
        return self._client.result(self.id, timeout)

    def status(self) -> TaskRecord:
        """What the ledger holds of it now."""
        return self._client.status(self.id)

    def cancel(self) -> State:
        """Cancel it; returns the state it was found in."""
        return self._client.cancel(self.id)

    def explain(self) -> Explanation | None:
        """Why it was placed (or refused) as it was; None while it is undecided."""
        return self._client.explain(self.id)


class Client:
    """A producer's connection. Thread-safe. `url` overrides PERLLM_REDIS_URL.

    Every method raises perllm.broker.errors.Unreachable when the server cannot be used.
    """

    def __init__(
        self, url: str | None = None, *, settings: Settings | None = None, reply_timeout: float = REPLY_TIMEOUT
    ) -> None:
        from perllm.broker.settings import load_settings  # noqa: PLC0415

        self.settings = settings or (load_settings(redis_url=url) if url else load_settings())
        self.ledger = Ledger(self.settings, reply_timeout=reply_timeout)
        self.looks = Ledger(self.settings, reply_timeout=LOOK_TIMEOUT, retries=0)
        self.validator = TaskValidator(self.settings, self.ledger)
        self._announcements = ThreadedAnnouncements(self.settings)
        self._met = False  # whether the server has ever answered

    def submit(self, prompt: str | None = None, **fields: Unpack[TaskFields]) -> Handle:
        """Hand in one task: a `prompt`, or `messages=`. Raises InvalidTask; see TaskSpec for the fields."""
        return self.submit_many([self.accept(_with_prompt(prompt, fields))])[0]

    def submit_many(self, tasks: Iterable[str | Mapping[str, Any] | TaskSpec]) -> list[Handle]:
        """Hand in many tasks, pipelined: prompts, mappings of a TaskSpec's fields, or checked TaskSpecs. Raises
        InvalidTask at the first bad one; those before it may be stored."""
        specs = ((new_id(), t if isinstance(t, TaskSpec) else self.accept(_with_prompt(t, {}))) for t in tasks)
        ids = self.ledger.submit(specs)
        self._met = True
        return [Handle(task_id, self) for task_id in ids]

    def embed(
        self, inputs: Sequence[str], /, *, timeout: float | None = None, **fields: Unpack[TaskFields]
    ) -> list[list[float]]:
        """The embeddings of texts, in order, each of length 1: as many tasks as that takes, handed in and waited for.
        Their deadline is in an hour unless one is given. Raises InvalidTask, WaitTimeout and, for a task without a
        result, TaskFailed, TaskExpired or TaskRejected."""
        handles = self.submit_many(self._embedding_tasks(inputs, fields))
        results = {result.id: result for result in self.wait((h.id for h in handles), timeout)}
        return [vector for handle in handles for vector in _succeeded(results[handle.id]).vectors]

    def _embedding_tasks(self, inputs: Sequence[str], fields: Mapping[str, Any]) -> list[TaskSpec]:
        if isinstance(inputs, str):
            raise InvalidTask("inputs: a list of texts is required")
        key = fields.get("idempotency_key")
        tasks = []
        for number, some in enumerate(_parts(inputs, self.settings.max_prompt_bytes)):
            own = {"idempotency_key": f"{key}:{number}"} if key is not None and number else {}
            tasks.append(self.accept({"kind": "embed", "deadline": 3600.0, **fields, **own, "inputs": some}))
        return tasks

    def accept(self, fields: Mapping[str, Any], *, max_value: float = MAX_VALUE) -> TaskSpec:
        """Check a task without submitting it. Raises InvalidTask naming every field that is wrong."""
        return self.validator.accept(fields, max_value=max_value)

    def result(self, task_id: str, timeout: float | None = None) -> Result:
        """Wait for a task's final state. Raises WaitTimeout, TaskNotFound."""
        return next(self.wait([task_id], timeout))

    def wait(self, task_ids: Iterable[str], timeout: float | None = None) -> Iterator[Result]:
        """Results as tasks reach their final states, in that order, shortly after their deadlines at the latest. Raises
        WaitTimeout when `timeout` s have passed and TaskNotFound for an id the ledger does not hold. A server that is
        away for less than a minute meanwhile is waited for, if the deadlines allow."""
        left = dict.fromkeys(task_ids, inf)  # when each is due, on this machine's monotonic clock, once it is known
        give_up = inf if timeout is None else time.monotonic() + timeout
        channels = {self.ledger.ended(i): i for i in left}
        heard = SimpleQueue[str]()
        bell, outage = heard.put, _Outage(time.monotonic() if self._met else None)
        self._announcements.listen(bell, channels)  # before looking, so that nothing ends unheard in between
        try:
            fresh, everything, due_at = list(left), True, inf
            while True:
                pause = LOOK_EVERY
                try:
                    if time.monotonic() >= due_at:
                        self.looks.expire()
                    for start in range(0, len(fresh), _CHUNK):
                        yield from self._look(fresh[start : start + _CHUNK], left)
                    outage.over()
                    self._met = True
                except Unreachable:
                    if not outage.bearable(min(left.values())):
                        raise
                    pause = random.uniform(*OUTAGE_LOOKS)
                if not left:
                    return
                now = time.monotonic()
                if now >= give_up:
                    raise WaitTimeout(f"{len(left)} task(s) not final after {timeout:g} s; they go on")
                if everything:
                    due_at = max(min(left.values()), now) + OVERDUE
                fresh = [
                    i for channel in _hear(heard, min(now + pause, give_up, due_at)) if (i := channels[channel]) in left
                ]
                everything = not fresh or time.monotonic() >= due_at
                if everything:
                    fresh = list(left)
        finally:
            self._announcements.forget(bell, channels)

    def _look(self, task_ids: Sequence[str], left: dict[str, float]) -> Iterator[Result]:
        """The results there are among these, which are taken out of `left`."""
        for some in self.looks.readable_at_once(task_ids):
            outcomes, now = self.looks.outcomes(some), time.monotonic()
            for task_id, outcome in zip(some, outcomes, strict=True):
                if outcome is None:
                    raise _not_found(task_id)
                if isinstance(outcome, Result):
                    del left[task_id]
                    yield outcome
                else:
                    left[task_id] = now + outcome

    def status(self, task_id: str) -> TaskRecord:
        """Everything known of a task now. Raises TaskNotFound."""
        record = self.ledger.task(task_id)
        if record is None:
            raise _not_found(task_id)
        return record

    def find(self, beginnings: Sequence[str]) -> list[str]:
        """The whole ids of the tasks whose ids begin so, in order, for people who have copied a part. Raises
        TaskNotFound, also for what several begin with."""
        known = dict(zip(beginnings, self.ledger.known(beginnings), strict=True))
        return [given if known[given] else self._find(given) for given in beginnings]

    def _find(self, beginning: str) -> str:
        found = self.ledger.beginning_with(beginning, _AMBIGUOUS + 1)
        if len(found) > 1:
            some = ", ".join(found[:_AMBIGUOUS]) + (", …" if len(found) > _AMBIGUOUS else "")
            raise TaskNotFound(f"several tasks begin with {beginning!r}: {some}")
        if not found:
            raise TaskNotFound(f"no task {beginning!r} (unknown, or finished and forgotten)")
        return found[0]

    def cancel(self, task_id: str) -> State:
        """Cancel a task; returns the state it was found in (a final one stays). Raises TaskNotFound."""
        state = self.ledger.cancel(task_id)
        if state is None:
            raise _not_found(task_id)
        return state

    def explain(self, task_id: str) -> Explanation | None:
        """Why a task went where it went; None while it is undecided. Raises TaskNotFound."""
        return self.status(task_id).why

    def retry(self, task_id: str) -> Handle:
        """Submit a finished task's work again as a new task, its deadline counted from now. Raises TaskNotFound."""
        spec = self.status(task_id).spec
        now = {"idempotency_key": None, "start_after": 0.0, "deadline": spec.deadline - spec.start_after}
        spec = spec.model_copy(update=now)
        return self.submit_many([spec])[0]

    def close(self) -> None:
        """Close the connections."""
        self._announcements.close()
        self.looks.close()
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class AsyncHandle:
    """One submitted task, for asyncio; see Handle."""

    id: str
    _client: AsyncClient

    async def result(self, timeout: float | None = None) -> Result:
        return await self._client.result(self.id, timeout)

    async def status(self) -> TaskRecord:
        return await self._client.status(self.id)

    async def cancel(self) -> State:
        return await self._client.cancel(self.id)

    async def explain(self) -> Explanation | None:
        return await self._client.explain(self.id)


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited. Thousands of results can be awaited at once over one connection.

    Short calls run in threads of its own; waiting uses one subscription shared by all waiters of this client, and one
    look at all that they wait for every `LOOK_EVERY` s: a waiter costs next to nothing until something is announced.
    """

    def __init__(
        self, url: str | None = None, *, settings: Settings | None = None, reply_timeout: float = REPLY_TIMEOUT
    ) -> None:
        self._client = Client(url, settings=settings, reply_timeout=reply_timeout)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="perllm-client")
        self._waiters: dict[_Waiter, None] = {}
        self._looker: asyncio.Task[None] | None = None
        self.settings = self._client.settings
        self.ledger, self.looks = self._client.ledger, self._client.looks
        self._announcements = Announcements(self.settings)

    async def accept(self, fields: Mapping[str, Any], *, max_value: float = MAX_VALUE) -> TaskSpec:
        """See Client.accept."""
        if self._client.validator.stale:
            await self._in_thread(self._client.validator.refresh)
        spec = self._client.validator.accept_unchecked(fields, max_value=max_value)
        await grammar.check_from_loop(spec)
        return spec

    async def submit(self, prompt: str | None = None, **fields: Unpack[TaskFields]) -> AsyncHandle:
        """See Client.submit."""
        handle = await self._in_thread(lambda: self._client.submit(prompt, **fields))
        return AsyncHandle(handle.id, self)

    async def submit_many(self, tasks: Iterable[str | Mapping[str, Any] | TaskSpec]) -> list[AsyncHandle]:
        """See Client.submit_many."""
        handles = await self._in_thread(self._client.submit_many, tasks)
        return [AsyncHandle(h.id, self) for h in handles]

    async def embed(
        self, inputs: Sequence[str], /, *, timeout: float | None = None, **fields: Unpack[TaskFields]
    ) -> list[list[float]]:
        """See Client.embed."""
        tasks = await self._in_thread(self._client._embedding_tasks, inputs, fields)
        handles = await self.submit_many(tasks)
        results = {result.id: result async for result in self.wait([h.id for h in handles], timeout)}
        return [vector for handle in handles for vector in _succeeded(results[handle.id]).vectors]

    async def result(self, task_id: str, timeout: float | None = None) -> Result:
        """See Client.result."""
        try:
            return await asyncio.wait_for(self._result(task_id), timeout)
        except TimeoutError:
            raise WaitTimeout(f"task {task_id} not final after {timeout:g} s; it goes on") from None

    async def _result(self, task_id: str) -> Result:
        async with self._waiter(task_id, self.ledger.ended(task_id)) as waiter:
            while True:
                (outcome,) = await self._through_outages(waiter, partial(self.looks.outcomes, [task_id]))
                if isinstance(outcome, Result):
                    return outcome
                await self._news(waiter, outcome)

    async def stream(self, task_id: str) -> AsyncIterator[str | Result]:
        """The text of a task submitted with `stream`, in pieces as it is generated, and last its Result: `deltas` for
        who wants the text of the first answer only. Raises TaskNotFound."""
        async for delta in self.deltas(task_id):
            if isinstance(delta, Result):
                yield delta
            elif delta.text and delta.index == 0:
                yield delta.text

    async def deltas(self, task_id: str) -> AsyncIterator[Delta | Result]:
        """The answer of a task submitted with `stream`, in pieces as it is generated, and last its Result.

        Reading again gives the same pieces, so who has left may come back and skip what he had. When an attempt was
        lost, what the next one says is passed on as far as it goes on from what was said; what it says otherwise is in
        the Result only, as is all of a task submitted without `stream`. Raises TaskNotFound.
        """
        said = _Said()
        async with self._waiter(task_id, self.ledger.ended(task_id), self.ledger.said(task_id)) as waiter:
            while True:
                look = partial(self._look_and_hear, task_id, waiter.heard)
                outcome, pieces = await self._through_outages(waiter, look)
                waiter.heard += len(pieces)
                for attempt, deltas in pieces:
                    for delta in deltas:
                        if (news := said.add(attempt, delta)) is not None:
                            yield news
                if isinstance(outcome, Result):
                    yield outcome
                    return
                await self._news(waiter, outcome)

    def _look_and_hear(self, task_id: str, heard: int) -> tuple[Result | float | None, list[tuple[int, list[Delta]]]]:
        (outcome,) = self.looks.outcomes([task_id])
        return outcome, self.looks.deltas(task_id, heard)  # in this order: what was said before it ended is all there

    async def _news(self, waiter: _Waiter, outcome: float | None) -> None:
        """Wait for news of a task, or until it is overdue and nobody else ends it. Raises TaskNotFound, Unreachable."""
        if outcome is None:
            raise _not_found(waiter.task_id)
        waiter.due = time.monotonic() + outcome
        try:
            async with asyncio.timeout(max(outcome, 0.0) + OVERDUE if outcome < inf else None):
                await waiter.rung()
        except TimeoutError:
            await self._through_outages(waiter, self.looks.expire)

    @asynccontextmanager
    async def _waiter(self, task_id: str, *channels: str) -> AsyncIterator[_Waiter]:
        """Rings when something is announced on one of the channels. The waiters of all share one connection."""
        if self._looker is None:
            self._looker = asyncio.create_task(self._look_for_all())
        waiter = _Waiter(task_id, texts=len(channels) > 1)
        self._waiters[waiter] = None
        try:
            await self._announcements.listen(waiter.ring, channels)
            yield waiter
        finally:
            self._waiters.pop(waiter, None)
            self._announcements.forget(waiter.ring, channels)

    async def _look_for_all(self) -> None:
        """Every so often, wake those for whom there is something new though they heard nothing of it: announcements are
        lost with a connection. When the server has been away for a minute, they are told."""
        answered = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_EVERY)
            waiters = list(self._waiters)
            try:
                for start in range(0, len(waiters), _CHUNK):
                    some = waiters[start : start + _CHUNK]
                    news = await self._in_thread(self.looks.news, [(w.task_id, w.heard) for w in some])
                    for waiter in (w for w, new in zip(some, news, strict=True) if new):
                        waiter.ring()
                answered = time.monotonic()
            except Unreachable as error:
                if time.monotonic() > answered + OUTAGE:
                    for waiter in waiters:
                        waiter.fail(error)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *arguments))

    async def _through_outages(self, waiter: _Waiter, look: Callable[[], T]) -> T:
        """What there is to see, also when the server is away for less than a minute, if the deadline allows."""
        patience = min(OUTAGE, max(waiter.due - time.monotonic(), 0.0) + OVERDUE_OUTAGE)
        lately = Unreachable(f"the server at {self.settings.address} has not answered for {patience:.1f} s")
        try:
            async with asyncio.timeout(patience):
                while True:
                    try:
                        return await self._in_thread(look)
                    except Unreachable as error:
                        lately = error
                        await asyncio.sleep(random.uniform(*OUTAGE_LOOKS))
        except TimeoutError:
            raise lately from None

    async def wait(self, task_ids: Iterable[str], timeout: float | None = None) -> AsyncIterator[Result]:
        """See Client.wait."""
        for next_done in asyncio.as_completed([self.result(i, timeout) for i in task_ids]):
            yield await next_done

    async def status(self, task_id: str) -> TaskRecord:
        """See Client.status."""
        return await self._in_thread(self._client.status, task_id)

    async def cancel(self, task_id: str) -> State:
        """See Client.cancel."""
        return await self._in_thread(self._client.cancel, task_id)

    async def explain(self, task_id: str) -> Explanation | None:
        """See Client.explain."""
        return await self._in_thread(self._client.explain, task_id)

    async def close(self) -> None:
        """Close the connections."""
        if self._looker is not None:
            self._looker.cancel()
        await self._announcements.close()
        await self._in_thread(self._client.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Waiter:
    """Somebody who waits for news of a task; `heard` is how many pieces of its text he has (-1: he wants none), `due`
    its deadline on this machine's monotonic clock, once it is known."""

    __slots__ = ("_bell", "_error", "due", "heard", "task_id")

    def __init__(self, task_id: str, *, texts: bool) -> None:
        self.task_id, self.heard, self.due = task_id, 0 if texts else -1, inf
        self._bell = asyncio.Event()
        self._error: Unreachable | None = None

    def ring(self, channel: str = "") -> None:  # noqa: ARG002  there is one task only
        """There are news."""
        self._bell.set()

    def fail(self, error: Unreachable) -> None:
        """There will be no news."""
        self._error = error
        self._bell.set()

    async def rung(self) -> None:
        """Wait for news. Raises Unreachable."""
        await self._bell.wait()
        self._bell.clear()
        if self._error is not None:
            raise self._error


class _Said:
    """What a watcher has been told, over the attempts that told it."""

    def __init__(self) -> None:
        self._attempt = 0
        self._said: dict[_Part, str] = {}
        self._retold: dict[_Part, str] = {}

    def add(self, attempt: int, delta: Delta) -> Delta | None:
        """The part of this piece that goes on from what was said; None while a later attempt repeats that, and for
        good once it differs."""
        if attempt != self._attempt:
            self._attempt, self._retold = attempt, {}
        part, text = _part(delta)
        said, retold = self._said.get(part), self._retold.get(part, "") + text
        self._retold[part] = retold
        if said is None:
            self._said[part] = retold
            return delta
        if not retold.startswith(said) or len(retold) == len(said):
            return None
        self._said[part] = retold
        return delta.model_copy(update={part.field: retold[len(said) :], "id": None, "name": None})


class _Part(NamedTuple):
    """What a piece goes on with: a choice's text or thought, or a call's arguments."""

    choice: int
    call: int | None
    field: Literal["text", "reasoning", "arguments"]


def _part(delta: Delta) -> tuple[_Part, str]:
    field: Literal["text", "reasoning", "arguments"] = (
        "arguments" if delta.call is not None else "reasoning" if delta.reasoning else "text"
    )
    return _Part(delta.index, delta.call, field), getattr(delta, field)


class _Outage:
    """Whether a server that does not answer is asked again: not one that never did (`answered` None)."""

    def __init__(self, answered: float | None) -> None:
        self._answered = answered

    def over(self) -> None:
        """It answered."""
        self._answered = time.monotonic()

    def bearable(self, due: float) -> bool:
        """Whether there is time for it to come back before what is waited for is due."""
        last = self._answered
        return last is not None and time.monotonic() <= min(last + OUTAGE, max(last, due) + OVERDUE_OUTAGE)


def _hear(heard: SimpleQueue[str], until: float) -> dict[str, None]:
    """What was announced, after waiting for the first until then."""
    found: dict[str, None] = {}
    with suppress(Empty):
        found[heard.get(timeout=max(0.0, until - time.monotonic()))] = None
        while True:
            found[heard.get_nowait()] = None
    return found


def _not_found(task_id: str) -> TaskNotFound:
    return TaskNotFound(f"no task {task_id!r} (unknown, or finished and forgotten)")


#: Inputs of one task that `embed` makes, at most: few enough that several nodes share the work.
_EMBEDDED_AT_ONCE = 256
_ENDS = {State.FAILED: TaskFailed, State.EXPIRED: TaskExpired, State.REJECTED: TaskRejected}


def _parts(inputs: Sequence[str], most_bytes: int) -> Iterator[Sequence[str]]:
    """The inputs in order, as many together as one task may have; all that are left, where they are none."""
    start = size = 0
    for number, text in enumerate(inputs):
        own = len(text.encode(errors="replace")) if isinstance(text, str) else 0
        if number > start and (size + own > most_bytes or number - start == _EMBEDDED_AT_ONCE):
            yield inputs[start:number]
            start, size = number, 0
        size += own
    yield inputs[start:]


def _succeeded(result: Result) -> Result:
    """The result of a task that has one. Raises as `AsyncResult.get` does for others."""
    if result.state is State.SUCCEEDED:
        return result
    raise _ENDS.get(result.state, TaskFailed)(f"task {result.id} {result.state}: {result.reason or 'no reason given'}")


def _with_prompt(task: str | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    if task is None:
        return fields
    return {"prompt": task, **fields} if isinstance(task, str) else {**task, **fields}
