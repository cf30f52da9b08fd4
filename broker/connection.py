"""How everything reaches the Redis server: one place for time-outs, retries and the errors a user sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from broker.errors import BadSetting, Unreachable
from broker.functions import missing
from broker.settings import Settings

#: Seconds a connection attempt, and a reply, may take. Producers may be far away and send much at once; the system's
#: own processes are near, and must soon notice a connection that leads nowhere.
CONNECT_TIMEOUT = 5.0
REPLY_TIMEOUT = 30.0
NEAR_REPLY_TIMEOUT = 5.0
#: Seconds after which nothing is repeated any more: the caller shall know.
RETRY_TIME = 10.0

T = TypeVar("T")


#: Errors, by the word they begin with, of a server that is there but may not or cannot write now, and the way out.
_CANNOT = {
    "MISCONF": "cannot write to its disk and stored nothing: make room there, and see its log",
    "READONLY": "is a read-only replica: set PERLLM_REDIS_URL to the primary's address",
    "NOREPLICAS": "has too few replicas to store anything: see its min-replicas-to-write",
    "BUSY": "is busy with a script that does not end: see its log; its administrator may end it with FUNCTION KILL or "
    "SCRIPT KILL",
}


class _Retry(Retry):
    """Repeats what the network may have spoilt, for a bounded time; a login refused once is refused again."""

    def call_with_retry(
        self,
        do: Callable[[], T],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> T:
        give_up = time.monotonic() + RETRY_TIME

        def worth_it(error: Exception) -> bool:
            refused = isinstance(error, redis.exceptions.AuthenticationError) or time.monotonic() > give_up
            return not refused and (is_retryable is None or is_retryable(error))

        return super().call_with_retry(do, fail, worth_it, with_failure_count)


def connect(settings: Settings, *, reply_timeout: float | None = REPLY_TIMEOUT) -> redis.Redis:
    """A client for the server in force. Connects on first use, retries a lost connection with backoff and jitter.

    Raises BadSetting for a URL with an option there is not."""
    retry = _Retry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries=5)
    options = _options(settings) | {"socket_timeout": reply_timeout, "retry": retry}
    try:
        client: redis.Redis = redis.Redis.from_url(settings.url, **options)
        client.connection_pool.make_connection()  # connects nothing yet, but finds what the URL may not say
    except (TypeError, ValueError) as error:
        raise BadSetting(f"PERLLM_REDIS_URL: {str(error).rpartition('() ')[2]}") from None
    return client


def connect_async(settings: Settings) -> redis.asyncio.Redis:
    """The same for asyncio, for subscriptions."""
    return redis.asyncio.Redis.from_url(settings.url, **_options(settings))


def _options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"health_check_interval": 15}
    if not settings.url.startswith("unix:"):
        options |= {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_keepalive": True}
    return options


@contextmanager
def reaching(settings: Settings) -> Iterator[None]:
    """Turn a connection's failures into `Unreachable` with the address and what to do."""
    at = settings.address
    try:
        yield
    except redis.exceptions.AuthenticationError as error:
        raise Unreachable(
            f"the server at {at} refused the login ({error}): check user and password in PERLLM_REDIS_URL"
        ) from None
    except redis.exceptions.NoPermissionError as error:
        raise Unreachable(f"the user in PERLLM_REDIS_URL may not do this at {at}: {error}") from None
    except redis.exceptions.OutOfMemoryError:
        raise Unreachable(
            f"the server at {at} is out of memory and stored nothing: raise its maxmemory or shorten PERLLM_RETENTION"
        ) from None
    except redis.exceptions.ResponseError as error:
        if missing(error):
            raise Unreachable(
                f"the server at {at} has not the functions of this version of PerLLM, and this user may not load them: "
                "do so once with `perllm ledger load`, as its administrator (PERLLM_REDIS_URL)"
            ) from None
        read_only = isinstance(error, redis.exceptions.ReadOnlyError)  # redis-py takes the word off
        kind = "READONLY" if read_only else str(error).partition(" ")[0]
        if kind not in _CANNOT:
            raise
        raise Unreachable(f"the server at {at} {_CANNOT[kind]} ({error})") from None
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        hint = "start it with `perllm up`, or set PERLLM_REDIS_URL" if settings.redis_url is None else "is it running?"
        raise Unreachable(f"no Redis server answers at {at} ({error}): {hint}") from None


def check(settings: Settings) -> None:
    """Make sure the server is there, lets us in and is new enough (Redis 7.0 or Valkey 7.2). Raises Unreachable."""
    with reaching(settings):
        version = str(connect(settings).info("server")["redis_version"])
    if int(version.split(".", 1)[0]) < 7:
        raise Unreachable(f"the server at {settings.address} is version {version}; Redis 7.0 or Valkey 7.2 is needed")
