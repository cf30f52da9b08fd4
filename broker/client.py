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
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar, Unpack

import redis
import redis.asyncio

from perllm.broker import grammar
from perllm.broker.connection import connect, connect_async, reaching
from perllm.broker.errors import (
    InvalidTask,
    TaskExpired,
    TaskFailed,
    TaskNotFound,
    TaskRejected,
    Unreachable,
    WaitTimeout,
)
from perllm.broker.ledger import ENDED, Ledger, TaskRecord
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
#: Channels per SUBSCRIBE, ids per look.
_CHUNK = 1000
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

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        from perllm.broker.settings import load_settings  # noqa: PLC0415

        self.settings = settings or (load_settings(redis_url=url) if url else load_settings())
        self.ledger = Ledger(self.settings)
        self.validator = TaskValidator(self.settings, self.ledger)

    def submit(self, prompt: str | None = None, **fields: Unpack[TaskFields]) -> Handle:
        """Hand in one task: a `prompt`, or `messages=`. Raises InvalidTask; see TaskSpec for the fields."""
        return Handle(self.ledger.submit([(new_id(), self.accept(_with_prompt(prompt, fields)))])[0], self)

    def submit_many(self, tasks: Iterable[str | Mapping[str, Any] | TaskSpec]) -> list[Handle]:
        """Hand in many tasks, pipelined: prompts, mappings of a TaskSpec's fields, or checked TaskSpecs. Raises
        InvalidTask at the first bad one; those before it may be stored."""
        specs = ((new_id(), t if isinstance(t, TaskSpec) else self.accept(_with_prompt(t, {}))) for t in tasks)
        return [Handle(task_id, self) for task_id in self.ledger.submit(specs)]

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
        """Results as tasks reach their final states, in that order. Raises WaitTimeout when `timeout` s have passed
        and TaskNotFound for an id the ledger does not hold. A server that is away for less than a minute meanwhile is
        waited for."""
        left = dict.fromkeys(task_ids)
        give_up = None if timeout is None else time.monotonic() + timeout
        answered: float | None = None  # when the server last did
        while left:
            try:
                for result in self._follow(left, give_up):
                    answered = time.monotonic()
                    if result is not None:
                        yield result
            except Unreachable:
                if answered is None or time.monotonic() > answered + OUTAGE:
                    raise
                time.sleep(random.uniform(*OUTAGE_LOOKS))
            if left and give_up is not None and time.monotonic() >= give_up:
                raise WaitTimeout(f"{len(left)} task(s) not final after {timeout:g} s; they go on")

    def _follow(self, left: dict[str, None], give_up: float | None) -> Iterator[Result | None]:
        """Take results out of `left` as they come, until it is empty or `give_up`; None whenever the server answered
        that there is no more yet."""
        with reaching(self.settings), _Announcements(self.settings, self.ledger.said) as announcements:
            announcements.listen(left)  # before looking, so that nothing ends unheard in between
            fresh: list[str] | None = None
            while left:
                for result in self._look(list(left) if fresh is None else fresh, everything=fresh is None):
                    del left[result.id]
                    yield result
                yield None
                patience = LOOK_EVERY if give_up is None else min(LOOK_EVERY, give_up - time.monotonic())
                if not left or patience <= 0:
                    return
                fresh = announcements.hear(patience, left)

    def _look(self, task_ids: list[str], *, everything: bool) -> Iterator[Result]:
        """The results there are among these, of which few are held at once."""
        for start in range(0, len(task_ids), _CHUNK):
            chunk = task_ids[start : start + _CHUNK]
            missing = []
            for task_id, result in zip(chunk, self.ledger.each_result(chunk), strict=True):
                if result is None:
                    missing.append(task_id)
                else:
                    yield result
            if everything and missing:
                for task_id, known in zip(missing, self.ledger.known(missing), strict=True):
                    if not known:
                        raise TaskNotFound(f"no task {task_id!r} (unknown, or finished and forgotten)")

    def status(self, task_id: str) -> TaskRecord:
        """Everything known of a task now. Raises TaskNotFound."""
        record = self.ledger.task(task_id)
        if record is None:
            raise TaskNotFound(f"no task {task_id!r} (unknown, or finished and forgotten)")
        return record

    def cancel(self, task_id: str) -> State:
        """Cancel a task; returns the state it was found in (a final one stays). Raises TaskNotFound."""
        state = self.ledger.cancel(task_id)
        if state is None:
            raise TaskNotFound(f"no task {task_id!r} (unknown, or finished and forgotten)")
        return state

    def explain(self, task_id: str) -> Explanation | None:
        """Why a task went where it went; None while it is undecided. Raises TaskNotFound."""
        return self.status(task_id).why

    def retry(self, task_id: str) -> Handle:
        """Submit a finished task's work again as a new task, its deadline counted from now. Raises TaskNotFound."""
        spec = self.status(task_id).spec.model_copy(update={"idempotency_key": None})
        return self.submit_many([spec])[0]

    def close(self) -> None:
        """Close the connections."""
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

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        self._client = Client(url, settings=settings)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="perllm-client")
        self._waiters: dict[_Waiter, None] = {}
        self._looker: asyncio.Task[None] | None = None
        self.settings = self._client.settings
        self.ledger = self._client.ledger
        self._bells: dict[str, set[_Waiter]] = {}  # channel → those who wait for it
        self._pubsub: redis.asyncio.client.PubSub | None = None
        self._subscribed = asyncio.Event()
        self._subscribing = asyncio.Lock()
        self._listener: asyncio.Task[None] | None = None

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
        async with self._waiter(task_id) as waiter:
            everything = True
            while True:
                if found := await self._through_outages(partial(self._look_at, task_id, everything)):
                    return found[0]
                everything = await waiter.rung()

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
        said, everything = _Said(), True
        async with self._waiter(task_id, texts=True) as waiter:
            while True:
                look = partial(self._look_and_hear, task_id, waiter.heard, everything)
                found, pieces = await self._through_outages(look)
                waiter.heard += len(pieces)
                for attempt, deltas in pieces:
                    for delta in deltas:
                        if (news := said.add(attempt, delta)) is not None:
                            yield news
                if found:
                    yield found[0]
                    return
                everything = await waiter.rung()

    def _look_at(self, task_id: str, everything: bool) -> list[Result]:
        return list(self._client._look([task_id], everything=everything))

    def _look_and_hear(
        self, task_id: str, heard: int, everything: bool
    ) -> tuple[list[Result], list[tuple[int, list[Delta]]]]:
        found = self._look_at(task_id, everything)
        return found, self.ledger.deltas(task_id, heard)  # in this order: what was said before it ended is all there

    @asynccontextmanager
    async def _waiter(self, task_id: str, *, texts: bool = False) -> AsyncIterator[_Waiter]:
        """Rings when the task has ended and, with `texts`, when there are pieces of its text. The waiters of all share
        one connection."""
        pubsub = self._listen()
        waiter, channel = _Waiter(task_id, texts=texts), self.ledger.said(task_id)
        self._waiters[waiter] = None
        self._bells.setdefault(channel, set()).add(waiter)
        try:
            with reaching(self.settings):
                async with self._subscribing:  # or the first of them would open a connection each
                    await pubsub.subscribe(channel)
            self._subscribed.set()
            yield waiter
        finally:
            self._waiters.pop(waiter, None)
            self._bells[channel].discard(waiter)
            if not self._bells[channel]:
                del self._bells[channel]
                with suppress(redis.exceptions.RedisError):
                    await pubsub.unsubscribe(channel)

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
                    news = await self._in_thread(self.ledger.news, [(w.task_id, w.heard) for w in some])
                    for waiter in (w for w, new in zip(some, news, strict=True) if new):
                        waiter.ring(everything=True)
                answered = time.monotonic()
            except Unreachable as error:
                if time.monotonic() > answered + OUTAGE:
                    for waiter in waiters:
                        waiter.fail(error)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *arguments))

    async def _through_outages(self, look: Callable[[], T]) -> T:
        """What there is to see, also when the server is away for less than a minute."""
        give_up = time.monotonic() + OUTAGE
        while True:
            try:
                return await self._in_thread(look)
            except Unreachable:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(random.uniform(*OUTAGE_LOOKS))

    def _listen(self) -> redis.asyncio.client.PubSub:
        if self._pubsub is None:
            client = connect_async(self.settings)
            self._pubsub = client.pubsub(ignore_subscribe_messages=True)
            self._listener = asyncio.create_task(self._hear(self._pubsub))
            self._looker = asyncio.create_task(self._look_for_all())
        return self._pubsub

    async def _hear(self, pubsub: redis.asyncio.client.PubSub) -> None:
        while True:
            if not pubsub.subscribed:
                self._subscribed.clear()
                await self._subscribed.wait()
            try:
                message = await pubsub.get_message(timeout=LOOK_EVERY)
            except redis.exceptions.RedisError:
                message = None  # waiters look for themselves until the connection is back
                await asyncio.sleep(LOOK_EVERY)
            if message is not None:  # None: nothing came in time, or a subscription was confirmed
                for waiter in self._bells.get(message["channel"].decode(), ()):
                    if waiter.heard >= 0 or message["data"] == ENDED:
                        waiter.ring()

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
        for task in (self._listener, self._looker):
            if task is not None:
                task.cancel()
        if self._pubsub is not None:
            await self._pubsub.aclose()  # type: ignore[no-untyped-call]
        await self._in_thread(self._client.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Waiter:
    """Somebody who waits for news of a task; `heard` is how many pieces of its text he has (-1: he wants none)."""

    __slots__ = ("_bell", "_error", "_everything", "heard", "task_id")

    def __init__(self, task_id: str, *, texts: bool) -> None:
        self.task_id, self.heard = task_id, 0 if texts else -1
        self._bell, self._everything = asyncio.Event(), False
        self._error: Unreachable | None = None

    def ring(self, *, everything: bool = False) -> None:
        """There are news; `everything`: it may be that the task is no more."""
        self._everything |= everything
        self._bell.set()

    def fail(self, error: Unreachable) -> None:
        """There will be no news."""
        self._error = error
        self._bell.set()

    async def rung(self) -> bool:
        """Wait for news. Returns whether the task may be no more. Raises Unreachable."""
        await self._bell.wait()
        self._bell.clear()
        if self._error is not None:
            raise self._error
        everything, self._everything = self._everything, False
        return everything


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


class _Announcements:
    """The channels on which the ledger announces final states, for the tasks a waiter waits for."""

    def __init__(self, settings: Settings, channel: Callable[[str], str]) -> None:
        self._redis = connect(settings)
        self._channel, self._prefix = channel, channel("")
        self._pubsub: redis.client.PubSub = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]

    def listen(self, task_ids: Iterable[str]) -> None:
        channels = [self._channel(i) for i in task_ids]
        for start in range(0, len(channels), _CHUNK):
            self._pubsub.subscribe(*channels[start : start + _CHUNK])

    def hear(self, patience: float, awaited: Mapping[str, object]) -> list[str] | None:
        """Ids just announced, after waiting up to `patience` s for the first; None for silence."""
        heard: dict[str, None] = {}
        until = time.monotonic() + patience
        while (left := until - time.monotonic()) > 0:
            message = self._pubsub.get_message(timeout=0 if heard else left)
            task_id = "" if message is None else message["channel"].decode().removeprefix(self._prefix)
            if message is not None and message["data"] == ENDED and task_id in awaited:
                heard[task_id] = None
            elif message is None and (heard or not self._pubsub.subscribed):
                break
        return list(heard) or None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pubsub.close()
        self._redis.close()


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
