"""Who is asking: the API key of a request, and the tenant it stands for."""

from __future__ import annotations

import ipaddress
import math
import time
from dataclasses import dataclass

from perllm.broker.api.errors import ApiError
from perllm.broker.api.keys import Key, Keys
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.threads import TenantThreadPool
from perllm.broker.messages import MAX_VALUE

#: Seconds a key that was looked up is taken as valid: a revoked one is refused after so long at the latest.
CACHE_TIME = 2.0
#: Keys cached.
CACHE_SIZE = 10_000


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. `key` is None where none is needed (PERLLM_API_OPEN)."""

    tenant: str
    key: Key | None

    @property
    def max_value(self) -> float:
        """The highest value its tasks may have. Without a key, the caller is this machine's user."""
        return MAX_VALUE if self.key is None else self.key.max_value

    @property
    def operator(self) -> bool:
        """Whether it may see sums over all tenants. Without a key, the caller is this machine's user."""
        return self.key is None or self.key.operator

    @property
    def name(self) -> str:
        """What its requests are counted by: its key, or that it has none."""
        return self.key.id if self.key is not None else "open"


class Callers:
    """Finds the caller of a request."""

    def __init__(self, settings: ApiSettings, keys: Keys, pool: TenantThreadPool) -> None:
        self._settings, self._keys, self._pool = settings, keys, pool
        self._cache: dict[str, tuple[float, Caller]] = {}

    async def admit(self, given: str | None) -> Caller:
        """The caller with this key. Raises ApiError for a wrong key and for too many requests."""
        caller = await self._find(given)
        if caller is None:
            how = "send `Authorization: Bearer <key>`; keys are made with `perllm api keys make`"
            message = f"no API key was given: {how}" if given is None else f"this API key is not valid: {how}"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if caller.key is not None and caller.key.rate is not None:
            wait = await self._pool.run(caller.name, self._keys.wait, caller.key)
            if wait > 0:
                raise ApiError(
                    429,
                    f"more than {caller.key.rate:g} requests per second with this key",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(math.ceil(wait))},
                )
        return caller

    async def _find(self, given: str | None) -> Caller | None:
        if given is None or not Keys.is_key(given):  # clients that insist on a key make one up
            return Caller("default", None) if self._settings.api_open else None
        cached = self._cache.get(given)
        if cached is not None and time.monotonic() - cached[0] < CACHE_TIME:
            return cached[1]
        key = await self._pool.run("", self._keys.find, given)
        if key is None:  # not cached: a client can make up any number of these
            return None
        if len(self._cache) >= CACHE_SIZE:
            self._cache.clear()
        caller = Caller(key.tenant, key)
        self._cache[given] = (time.monotonic(), caller)
        return caller


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
