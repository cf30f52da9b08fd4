"""What all endpoints share: who is asking, and how a request becomes a task."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic_core import from_json

from perllm.broker.api.batches.runner import BatchRunner
from perllm.broker.api.batches.store import Batches
from perllm.broker.api.errors import ApiError, not_found
from perllm.broker.api.files.store import Files
from perllm.broker.api.keys import Key, Keys
from perllm.broker.api.request_limits import CALLER
from perllm.broker.api.submit_coalescer import SubmitCoalescer
from perllm.broker.api.threads import Pool
from perllm.broker.api.webhooks.dispatcher import WebhookDispatcher
from perllm.broker.api.webhooks.store import Webhooks
from perllm.broker.client import AsyncClient
from perllm.broker.ledger import TaskRecord
from perllm.broker.messages import MAX_VALUE, Result, TaskSpec, new_id
from perllm.broker.openai.translation import seconds_left
from perllm.broker.settings import Settings

#: Seconds a key once looked up is taken for granted: a revoked one is refused after so long at the latest.
REMEMBER = 2.0
#: Keys remembered.
MOST_REMEMBERED = 10_000
#: Seconds beyond a task's deadline that its result may take to be there.
PATIENCE = 30.0
#: Seconds of silence after which a stream says that it is still there.
HEARTBEAT = 15.0
#: Uploads at once; a quarter of them of one key.
MOST_UPLOADS = 32
#: Longest id looked up, characters.
MAX_ID = 256
#: Most fields of a body, and values of all kinds in it, about: each costs many times its bytes while it is looked at.
MAX_FIELDS, MAX_VALUES = 200, 500_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking. `key` is None for who may do without."""

    tenant: str
    key: Key | None

    @property
    def max_value(self) -> float:
        """The highest value its tasks may have: whoever needs no key is this machine's user."""
        return MAX_VALUE if self.key is None else self.key.max_value

    @property
    def name(self) -> str:
        """What is his is counted by: his key, or that he has none."""
        return self.key.id if self.key is not None else "open"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A task in the ledger. `repeated`: it was there before, under the same idempotency key."""

    id: str
    spec: TaskSpec
    submitted: float
    repeated: bool = False


class Api:
    """One API process's connections and state. To be made in the event loop that uses it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = AsyncClient(settings=settings)
        self.ledger = self.client.ledger
        self.keys = Keys(settings, self.ledger)
        self.files = Files(settings, self.ledger)
        self.batches = Batches(settings, self.ledger)
        self.webhooks = Webhooks(settings, self.ledger)
        self.webhook_dispatcher = WebhookDispatcher(settings, self.ledger, self.webhooks)
        self.runner = BatchRunner(settings, self.ledger, self.files, self.batches, self.webhook_dispatcher.batch_ended)
        self.address_checks: Counter[str] = Counter()  # of webhooks, by tenant, going on now
        self.quick = Pool("quick", threads=8, each=4, waiting=2000, patience=60.0)  # calls of milliseconds
        self.slow = Pool("slow", threads=4, each=1, waiting=32, patience=60.0)  # lists, and what else is long
        self.disk = Pool("files", threads=8, each=2, waiting=64, patience=600.0)
        self._coalescer = SubmitCoalescer(settings, self.ledger)
        self._seats: Counter[str] = Counter()  # requests that wait for a result, by caller
        self._uploads: Counter[str] = Counter()
        self._callers: dict[str, tuple[float, Caller]] = {}
        self._lacking: list[str] = []
        self._looked, self._readying = float("-inf"), asyncio.Lock()
        self._errands: set[asyncio.Task[Any]] = set()

    # --- who is asking

    async def admit(self, given: str | None) -> Caller:
        """Who gave this key. Raises ApiError for a wrong key and for too many requests."""
        caller = await self._recognise(given)
        if caller is None:
            how = "send `Authorization: Bearer <key>`; keys are made with `perllm api keys make`"
            message = f"no API key was given: {how}" if given is None else f"this API key is not valid: {how}"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if caller.key is not None and caller.key.rate is not None:
            wait = await self.quick.run(caller.name, self.keys.wait, caller.key)
            if wait > 0:
                raise ApiError(
                    429,
                    f"more than {caller.key.rate:g} requests per second with this key",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(math.ceil(wait))},
                )
        return caller

    async def _recognise(self, given: str | None) -> Caller | None:
        if given is None or not Keys.is_key(given):  # clients that insist on a key make one up
            return Caller("default", None) if self.settings.api_open else None
        known = self._callers.get(given)
        if known is not None and time.monotonic() - known[0] < REMEMBER:
            return known[1]
        key = await self.quick.run("", self.keys.find, given)
        caller = Caller(key.tenant, key) if key is not None else None
        if caller is None:  # anybody can make up any number of these
            return None
        if len(self._callers) >= MOST_REMEMBERED:
            self._callers.clear()
        self._callers[given] = (time.monotonic(), caller)
        return caller

    # --- tasks

    async def accept(self, caller: Caller, fields: Mapping[str, Any]) -> TaskSpec:
        """The checked task of this caller. Raises InvalidTask, ApiError."""
        given = {**fields, "tenant": caller.tenant}
        if isinstance(given.get("deadline"), str):
            given["deadline"] = await self.seconds_left(given["deadline"])
        return await self.client.accept(given, max_value=caller.max_value)

    async def seconds_left(self, deadline: str) -> float:
        """A deadline given as text: seconds, or a time (RFC 3339) by the server's clock."""
        return seconds_left(deadline, await self.quick.run("", self.ledger.now))

    async def submit(self, caller: Caller, specs: Iterable[TaskSpec]) -> list[Accepted]:
        """Hand in checked tasks. Raises ApiError where they are too many at once, or where an idempotency key was used
        for another task, here or before: none of them is kept then."""
        tasks = [(new_id(), spec) for spec in specs]
        await self._check_keys(caller, [spec for _, spec in tasks])
        key = caller.key
        if key is not None and key.in_flight is not None:
            counted = {task_id: spec.deadline for task_id, spec in tasks}
            if not await self.quick.run(caller.name, self.keys.reserve, key, counted):
                raise ApiError(
                    429,
                    f"more than {key.in_flight} unfinished tasks with this key",
                    code="in_flight_limit_exceeded",
                    headers={"Retry-After": "1"},
                )
        now = time.time()
        ids = await self._coalescer.submit(caller.tenant, tasks)
        mine = {own for (own, _), in_force in zip(tasks, ids, strict=True) if own == in_force}
        accepted = []
        for (own, spec), in_force in zip(tasks, ids, strict=True):
            if in_force == own:
                accepted.append(Accepted(own, spec, now))
                continue
            first = await self.record(caller, in_force)
            if not _same(first.spec, spec):  # somebody was faster, after we had looked
                for task_id in mine:
                    await self.quick.run(caller.tenant, self.ledger.forget, task_id)
                raise _reused(spec)
            accepted.append(Accepted(in_force, first.spec, first.submitted, repeated=True))
        return accepted

    async def _check_keys(self, caller: Caller, specs: list[TaskSpec]) -> None:
        """That each idempotency key of a request of many stands for one task. That of a request of one is looked at
        when it is stored."""
        firsts: dict[str, TaskSpec] = {}
        for spec in specs:
            if spec.idempotency_key is not None and not _same(firsts.setdefault(spec.idempotency_key, spec), spec):
                raise _reused(spec)
        if len(specs) == 1 or not firsts:
            return
        holders = await self.quick.run(caller.tenant, self.ledger.holders, caller.tenant, list(firsts))
        for spec, holder in zip(firsts.values(), holders, strict=True):
            if holder is not None and not _same((await self.record(caller, holder)).spec, spec):
                raise _reused(spec)

    async def record(self, caller: Caller, task_id: str, what: str = "task") -> TaskRecord:
        """A task of this caller's tenant. Raises ApiError (404)."""
        if len(task_id) > MAX_ID:
            raise not_found(what, task_id)
        record = await self.quick.run(caller.tenant, self.ledger.task, task_id)
        if record is None or record.spec.tenant != caller.tenant:
            raise not_found(what, task_id)
        return record

    async def result(self, accepted: Accepted, request: Request) -> Result:
        """Wait for the result. When the client goes away meanwhile, a task nobody else may ask for is cancelled."""
        waiting = asyncio.create_task(self.client.result(accepted.id, accepted.spec.deadline + PATIENCE))
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            self.abandon(accepted)
            raise ApiError(499, "the client went away")
        finally:
            waiting.cancel()
            gone.cancel()

    def seat(self, caller: Caller) -> ExitStack:
        """A place among those who stream or wait for a result, until the stack is closed. Raises ApiError where there
        is none."""
        s = self.settings
        return _place(self._seats, caller, s.api_waiting, s.api_waiting_per_key, "streams and waits for results")

    def upload(self, caller: Caller) -> ExitStack:
        """A place among those who upload a file; see `seat`."""
        return _place(self._uploads, caller, MOST_UPLOADS, MOST_UPLOADS // 4, "uploads")

    def abandon(self, accepted: Accepted) -> None:
        """The client that waited has gone: cancel its task, unless it can come back for it."""
        if accepted.spec.idempotency_key is None:
            self.run(self.client.cancel(accepted.id))

    async def readiness(self) -> list[str]:
        """What is lacking before tasks can be done. Anybody may ask, so it is looked up once a second at most."""
        async with self._readying:
            if time.monotonic() > self._looked + REMEMBER / 2:
                led, nodes = await self.quick.run("", lambda: (self.ledger.led(), bool(self.ledger.nodes())))
                self._lacking = [what for what, there in (("scheduler", led), ("node", nodes)) if not there]
                self._looked = time.monotonic()
        return self._lacking

    def run(self, errand: Coroutine[Any, Any, Any]) -> None:
        """Do something nobody waits for."""
        task = asyncio.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    def start(self) -> None:
        """Begin what goes on beside the requests."""
        self.runner.start()
        self.webhook_dispatcher.start()

    async def close(self) -> None:
        await asyncio.gather(self.slow.run("", self.runner.close), self.slow.run("a", self.webhook_dispatcher.close))
        if self._errands:
            await asyncio.wait(self._errands, timeout=5)
        await self.client.close()
        for pool in (self.quick, self.slow, self.disk):
            pool.close()


def _place(taken: Counter[str], caller: Caller, most: int, each: int, what: str) -> ExitStack:
    name = caller.name
    if taken[name] >= each:
        message = f"{each} {what} at once with this key: end one of them"
        raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "5"})
    if taken.total() >= most:
        raise ApiError(503, f"too many {what} at once: try again", code="unavailable", headers={"Retry-After": "5"})
    taken[name] += 1

    def give_back() -> None:
        taken[name] -= 1
        if not taken[name]:
            del taken[name]

    place = ExitStack()
    place.callback(give_back)
    return place


def _reused(spec: TaskSpec) -> ApiError:
    message = f"idempotency_key: {spec.idempotency_key!r} was used for another request"
    return ApiError(422, message, param="idempotency_key", code="idempotency_key_reused")


def _same(first: TaskSpec, again: TaskSpec) -> bool:
    """Whether a repeated request asks for the same work. Its deadline may have been counted from another moment."""
    return first.model_copy(update={"deadline": again.deadline, "stream": again.stream}) == again


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def with_pauses(source: AsyncIterator[T], every: float = HEARTBEAT) -> AsyncIterator[T | None]:
    """What the source gives, and None whenever it gave nothing for so long, s."""
    following: asyncio.Future[T] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(cast("Coroutine[Any, Any, T]", anext(source)))
            done, _ = await asyncio.wait({following}, timeout=every)
            if not done:
                yield None
                continue
            try:
                item = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield item
    finally:
        if following is not None:
            following.cancel()


# --- what endpoints declare


async def the_api(request: Request) -> Api:  # asynchronous, or FastAPI would run it in a thread
    return cast(Api, request.app.state.api)


_bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="A key made with `perllm api keys make`.")


async def _caller(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    api: Api = request.app.state.api
    caller = await api.admit(given.credentials if given else None)
    request.scope[CALLER] = caller.name  # by whom the guard counts what is received
    return caller


async def _extensions(request: Request) -> dict[str, Any]:
    """The fields a request may also give as headers, which the document describes (`docs.EXTENSION_HEADERS`)."""
    given = {field: value for field, name in _HEADERS.items() if (value := request.headers.get(name)) is not None}
    if "value" in given:
        try:
            return {**given, "value": float(given["value"])}
        except ValueError:
            raise ApiError(400, "X-PerLLM-Value: a number is required", param="X-PerLLM-Value") from None
    return given


_HEADERS = {
    "idempotency_key": "idempotency-key",
    "deadline": "x-perllm-deadline",
    "value": "x-perllm-value",
    "service": "x-perllm-service",
}
TheApi = Annotated[Api, Depends(the_api)]
TheCaller = Annotated[Caller, Depends(_caller)]
Extensions = Annotated[dict[str, Any], Depends(_extensions)]


async def read_json(request: Request) -> dict[str, Any]:
    """The body, a JSON object. Raises ApiError."""
    raw = await request.body()
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ApiError(413, f"the body has more than {MAX_VALUES} values: send several requests")
    try:
        # The reader of what is stored, too: nested too deeply, or with half a surrogate pair, it is no JSON for both.
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    if len(body) > MAX_FIELDS:
        raise ApiError(400, f"the body has {len(body)} fields; the limit is {MAX_FIELDS}", code="invalid_json")
    return body


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
