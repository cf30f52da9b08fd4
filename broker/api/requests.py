"""What all endpoints share: who is asking, and how a request becomes a task."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from perllm.broker.api.batches.runner import BatchRunner
from perllm.broker.api.batches.store import Batches
from perllm.broker.api.errors import ApiError, not_found
from perllm.broker.api.files.store import Files
from perllm.broker.api.keys import Key, Keys
from perllm.broker.api.submit_coalescer import SubmitCoalescer
from perllm.broker.api.webhooks.dispatcher import WebhookDispatcher
from perllm.broker.api.webhooks.store import Webhooks
from perllm.broker.client import AsyncClient
from perllm.broker.ledger import TaskRecord
from perllm.broker.messages import Result, TaskSpec, new_id
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

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking. `key` is None for who may do without."""

    tenant: str
    key: Key | None


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
        self._coalescer = SubmitCoalescer(self.ledger)
        self._callers: dict[str, tuple[float, Caller | None]] = {}
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
            wait = await asyncio.to_thread(self.keys.wait, caller.key)
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
        key = await asyncio.to_thread(self.keys.find, given)
        caller = Caller(key.tenant, key) if key is not None else None
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
        return await self.client.accept(given)

    async def seconds_left(self, deadline: str) -> float:
        """A deadline given as text: seconds, or a time (RFC 3339) by the server's clock."""
        return seconds_left(deadline, await asyncio.to_thread(self.ledger.now))

    async def submit(self, caller: Caller, specs: Iterable[TaskSpec]) -> list[Accepted]:
        """Hand in checked tasks. Raises ApiError where they are too many at once, or where an idempotency key was used
        for another task."""
        tasks = [(new_id(), spec) for spec in specs]
        key = caller.key
        if key is not None and key.in_flight is not None:
            counted = {task_id: spec.deadline for task_id, spec in tasks}
            if not await asyncio.to_thread(self.keys.reserve, key, counted):
                raise ApiError(
                    429,
                    f"more than {key.in_flight} unfinished tasks with this key",
                    code="in_flight_limit_exceeded",
                    headers={"Retry-After": "1"},
                )
        now = time.time()
        ids = await self._coalescer.submit(tasks)
        accepted = []
        for (own, spec), in_force in zip(tasks, ids, strict=True):
            repeated = in_force != own
            if repeated:
                first = await self.record(caller, in_force)
                if not _same(first.spec, spec):
                    message = f"idempotency_key: {spec.idempotency_key!r} was used for another request"
                    raise ApiError(422, message, param="idempotency_key", code="idempotency_key_reused")
                accepted.append(Accepted(in_force, first.spec, first.submitted, repeated))
            else:
                accepted.append(Accepted(own, spec, now))
        return accepted

    async def record(self, caller: Caller, task_id: str, what: str = "task") -> TaskRecord:
        """A task of this caller's tenant. Raises ApiError (404)."""
        record = await asyncio.to_thread(self.ledger.task, task_id)
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

    def abandon(self, accepted: Accepted) -> None:
        """The client that waited has gone: cancel its task, unless it can come back for it."""
        if accepted.spec.idempotency_key is None:
            self.run(self.client.cancel(accepted.id))

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
        await asyncio.gather(asyncio.to_thread(self.runner.close), asyncio.to_thread(self.webhook_dispatcher.close))
        if self._errands:
            await asyncio.wait(self._errands, timeout=5)
        await self.client.close()


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
    return await api.admit(given.credentials if given else None)


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
#: For endpoints that show everybody the same, but only to who has a key.
needs_key = Depends(_caller)
Extensions = Annotated[dict[str, Any], Depends(_extensions)]


async def read_json(request: Request) -> dict[str, Any]:
    """The body, a JSON object. Raises ApiError."""
    raw = await request.body()
    try:
        body = json.loads(raw, parse_constant=_no_constant)
        if b"\\ud" in raw.lower():
            json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeError:
        raise ApiError(400, "the body is not UTF-8 text", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
