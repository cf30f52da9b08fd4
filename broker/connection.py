"""How everything reaches the Redis server: one place for time-outs, retries and the errors a user sees."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import ExponentialWithJitterBackoff
from redis.connection import HiredisRespSerializer, parse_url
from redis.retry import Retry

from perllm.broker.errors import BadSetting, Unreachable
from perllm.broker.functions import missing
from perllm.broker.messages import whole_text
from perllm.broker.sentinels import Sentinels

if TYPE_CHECKING:  # loaded when settings are read: half of what importing a client would take
    from perllm.broker.settings import Settings

#: Seconds a connection attempt, login included, and a reply, may take. Producers may be far away and send much at once;
#: the system's own processes are near, and must soon notice a connection that leads nowhere.
CONNECT_TIMEOUT = 5.0
REPLY_TIMEOUT = 30.0
NEAR_REPLY_TIMEOUT = 5.0
#: Seconds a reply may take where something is only looked at, and never again by itself: who looks will look again.
LOOK_TIMEOUT = 2.0
#: Seconds after which nothing is repeated any more: the caller shall know.
RETRY_TIME = 10.0

T = TypeVar("T")

_NEEDED = "Redis 7.0 or Valkey 7.2 is needed"

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
            final = isinstance(error, redis.exceptions.AuthenticationError | _Silent)
            refused = final or time.monotonic() > give_up
            return not refused and (is_retryable is None or is_retryable(error))

        return super().call_with_retry(do, fail, worth_it, with_failure_count)


class _Opening:
    """A connection that is opened (TCP, TLS, login, database) in bounded time, or refused with one clear error: who is
    silent for longer than that is no Redis server, however long its replies may take later."""

    _sock: Any
    db: Any
    socket_timeout: Any
    disconnect: Any
    update_current_socket_timeout: Any

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:  # noqa: ARG002
        if self._sock:
            return
        patience = self.socket_timeout
        self.socket_timeout = min(patience or CONNECT_TIMEOUT, CONNECT_TIMEOUT)
        try:
            # No PING before the login: it would be repeated, within the repeating of all this.
            super().connect_check_health(check_health=False, retry_socket_connect=retry_socket_connect)  # type: ignore[misc]
            self._check_version()
        except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError):
            raise
        except redis.exceptions.ResponseError as error:
            raise _Unfit(self._misfit(str(error))) from None
        except redis.exceptions.TimeoutError:
            raise _Silent(f"nothing within {self.socket_timeout:g} s") from None
        finally:
            self.socket_timeout = patience
        self.update_current_socket_timeout(-1)

    def _check_version(self) -> None:
        said = getattr(self, "handshake_metadata", None) or {}  # of HELLO, where the protocol is RESP3
        version = said.get(b"version", said.get("version"))
        if version is not None:
            try:
                _check_version(version.decode() if isinstance(version, bytes) else str(version))
            except _Unfit:
                self.disconnect()
                raise

    def _misfit(self, error: str) -> str:
        if "DB index" in error:
            return f"has no database {self.db}: see its setting 'databases'"
        if "unknown command" in error and "HELLO" in error:
            return f"is too old: {_NEEDED}"
        return f"refused the connection ({error})"


class _Unfit(redis.exceptions.RedisError):
    """What answers at the address, or does not, is no server we can use; trying again at once would not help."""


class _Silent(redis.exceptions.TimeoutError):
    """Nothing came from the address; waiting as long once more would not help."""


class _Plain(_Opening, redis.Connection):
    """By TCP."""


class _Tls(_Opening, redis.SSLConnection):
    """By TLS."""


class _Socket(_Opening, redis.UnixDomainSocketConnection):
    """By a Unix socket."""


class _Moving(_Opening, redis.sentinel.SentinelManagedConnection):
    """By TCP, to where the sentinels say: they are asked each time it is opened. By itself redis-py asks when one is
    taken from the pool, and opens one that broke to where the primary was."""

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        if not self._sock:
            self.host, self.port = self.connection_pool.get_master_address()
        super().connect_check_health(check_health, retry_socket_connect)

    def _connect_retry(self) -> None:
        self.connect_check_health()


_CLASSES = {"redis": _Plain, "rediss": _Tls, "unix": _Socket}


class _Packer(HiredisRespSerializer):
    """Sends text with half a surrogate pair, as an argument or an engine's error may contain, without it: it is an id
    of nothing, and no reason to fail."""

    def pack(self, *args: Any) -> list[bytes]:
        try:
            return cast("list[bytes]", super().pack(*args))
        except UnicodeEncodeError:
            whole: list[Any] = [whole_text(a) if isinstance(a, str) else a for a in args]
            return cast("list[bytes]", super().pack(*whole))


def connect(settings: Settings, *, reply_timeout: float | None = REPLY_TIMEOUT, retries: int = 5) -> redis.Redis:
    """A client for the server in force. Connects on first use, retries a lost connection with backoff and jitter.

    Raises BadSetting for a URL with an option there is not, or one that names a file that cannot be used."""
    if settings.sentinels is not None:
        retries *= 4  # a new primary takes seconds
    retry = _Retry(ExponentialWithJitterBackoff(base=0.05, cap=2.0), retries=retries)
    options = _options(settings) | {"socket_timeout": reply_timeout, "retry": retry, "command_packer": _Packer()}
    if settings.sentinels is not None:
        return _moving(settings.sentinels, options)
    options["connection_class"] = _CLASSES[settings.url.partition(":")[0]]
    try:
        client: redis.Redis = redis.Redis.from_url(settings.url, **options)
        unopened = client.connection_pool.make_connection()  # connects nothing yet, but finds what the URL may not say
    except (TypeError, ValueError) as error:
        raise BadSetting(f"PERLLM_REDIS_URL: {str(error).rpartition('() ')[2]}") from None
    if isinstance(unopened, _Tls):
        _check_files(unopened)
    return client


def _moving(sentinels: Sentinels, options: dict[str, Any]) -> redis.Redis:
    watch = redis.sentinel.Sentinel(sentinels.hosts, sentinel_kwargs=of_sentinels(sentinels))  # type: ignore[no-untyped-call]
    given = _of_server(sentinels) | options
    client: redis.Redis = watch.master_for(sentinels.name, connection_class=_Moving, **given)  # type: ignore[no-untyped-call]
    try:
        client.connection_pool.make_connection()
    except TypeError as error:
        raise BadSetting(f"PERLLM_REDIS_URL: {str(error).rpartition('() ')[2]}") from None
    return client


def of_sentinels(sentinels: Sentinels) -> dict[str, Any]:
    """How they are asked: one that is dead must not keep the others from being asked soon."""
    return {"socket_timeout": LOOK_TIMEOUT, "socket_connect_timeout": LOOK_TIMEOUT, **sentinels.own}


def _of_server(sentinels: Sentinels) -> dict[str, Any]:
    """Login, database and options. Raises BadSetting."""
    try:
        given = dict(parse_url(sentinels.server_url))  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise BadSetting(f"PERLLM_REDIS_URL: {error}") from None
    return {key: value for key, value in given.items() if key not in ("host", "port")}


def _check_files(connection: _Tls) -> None:
    """See that what the URL names of certificates and keys can be read; TLS itself says only that something cannot."""
    context = ssl.create_default_context()
    ways: dict[str, tuple[str | None, Callable[[str], object]]] = {
        "ssl_ca_certs": (connection.ca_certs, lambda path: context.load_verify_locations(cafile=path)),
        "ssl_ca_path": (connection.ca_path, lambda path: next(Path(path).iterdir(), None)),
        "ssl_certfile": (
            connection.certfile,
            lambda path: context.load_cert_chain(path, connection.keyfile, connection.certificate_password),
        ),
    }
    if connection.keyfile is not None and connection.certfile is None:
        raise BadSetting("PERLLM_REDIS_URL: ssl_keyfile: there is no ssl_certfile that it is the key of")
    for option, (path, load) in ways.items():
        try:
            if path is not None:
                load(path)
        except OSError as error:
            raise BadSetting(f"PERLLM_REDIS_URL: {option}: {path}: {error.strerror or error}") from None


def connect_async(settings: Settings) -> redis.asyncio.Redis:
    """The same for asyncio, for subscriptions."""
    options = _options(settings) | {"socket_timeout": CONNECT_TIMEOUT}
    if settings.sentinels is not None:
        how = of_sentinels(settings.sentinels)
        watch = redis.asyncio.sentinel.Sentinel(list(settings.sentinels.hosts), sentinel_kwargs=how)  # type: ignore[no-untyped-call]
        moving: redis.asyncio.Redis = watch.master_for(
            settings.sentinels.name, **_of_server(settings.sentinels) | options
        )
        return moving
    return redis.asyncio.Redis.from_url(settings.url, **options)


def _options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"health_check_interval": 15}
    if not settings.url.startswith("unix:"):
        options |= {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_keepalive": True}
    return options


def of_a_record(error: Exception) -> bool:
    """Whether a call failed on what is stored of the thing it was about, and not on the server or the caller: who does
    the same for many goes on with the next."""
    return type(error) is redis.exceptions.ResponseError and str(error).partition(" ")[0] not in _CANNOT


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
    except (_Unfit, redis.exceptions.InvalidResponse) as error:
        said = str(error) if isinstance(error, _Unfit) else f"does not speak Redis's protocol ({error})"
        raise Unreachable(f"the server at {at} {said}{_other_way(settings, error)}") from None
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise Unreachable(_untrusted(at, str(error))) from None
        hint = "start it with `perllm up`, or set PERLLM_REDIS_URL" if settings.redis_url is None else "is it running?"
        raise Unreachable(f"no Redis server answers at {at} ({error}): {hint}{_other_way(settings, error)}") from None


def _untrusted(at: str, said: str) -> str:
    reason = said.partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
    if "mismatch" in reason.lower():
        way_out = "PERLLM_REDIS_URL must name it as its certificate does"
    elif "expired" in reason or "not yet" in reason:
        way_out = "renew it, or set this machine's clock"
    else:
        way_out = "?ssl_ca_certs=<file> in PERLLM_REDIS_URL must be the certificate of who signed its"
    return f"the certificate of the server at {at} is not trusted ({reason or said}): {way_out}"


def _other_way(settings: Settings, error: Exception) -> str:
    """A hint where the two sides may disagree about TLS."""
    said = str(error)
    if settings.url.startswith("rediss:") and (isinstance(error, _Silent) or "WRONG_VERSION" in said or "EOF" in said):
        return " (without TLS its address begins with redis://)"
    garbled = isinstance(error, redis.exceptions.InvalidResponse)
    if settings.url.startswith("redis:") and (garbled or "closed" in said or "reset" in said):
        return " (with TLS its address begins with rediss://)"
    return ""


def _check_version(version: str) -> None:
    if int(version.split(".", 1)[0]) < 7:
        raise _Unfit(f"is version {version}; {_NEEDED}")


def check(settings: Settings) -> None:
    """Make sure the server is there, lets us in and is new enough (Redis 7.0 or Valkey 7.2). Raises Unreachable."""
    with reaching(settings), connect(settings, reply_timeout=CONNECT_TIMEOUT) as client:
        _check_version(str(client.info("server")["redis_version"]))
