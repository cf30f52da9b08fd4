"""API keys: made, listed and revoked by `perllm api keys`, kept as digests, each good for one tenant.

A key is `perllm_<id>_<secret>`. The secret has 256 random bits, so its plain SHA-256 gives nothing away and needs no
salt.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping

from broker.api.shelf import Document, Shelf
from broker.connection import reaching
from broker.errors import BadSetting
from broker.functions import Function
from broker.ledger import Ledger
from broker.messages import Name
from broker.settings import Settings

_FORM = re.compile(r"perllm_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_ALL = "all"

# Generic cell rate algorithm: the next request's theoretical arrival time, with a second's worth of burst.
_RATE = Function(
    "rate",
    """
local clock = redis.call('TIME')
local now, rate = clock[1] + clock[2] / 1e6, tonumber(ARGV[1])
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + 1 / rate
local wait = due - now - math.max(1, 1 / rate)
if wait > 1e-6 then return string.format('%.6f', wait) end
redis.call('SET', KEYS[1], string.format('%.6f', due), 'PX', math.ceil((due - now) * 1000) + 1000)
return '0'
""",
)
# The unfinished tasks a key has submitted, each counted until its deadline at the latest.
_RESERVE = Function(
    "reserve",
    """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) + (#ARGV - 1) / 2 > tonumber(ARGV[1]) then return 0 end
for i = 2, #ARGV, 2 do redis.call('ZADD', KEYS[1], now + ARGV[i + 1] + 60, ARGV[i]) end
return 1
""",
)


class Key(Document):
    """A key less its secret. `rate` is in requests per s, `in_flight` in unfinished tasks; None: no limit."""

    tenant: Name
    name: str
    digest: str
    rate: float | None = None
    in_flight: int | None = None
    revoked: float | None = None


class Keys:
    """All keys, and what each has used."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self._shelf: Shelf[Key] = Shelf(settings, ledger, "key", Key)
        self._rate = _RATE.on(ledger.client)
        self._reserve = _RESERVE.on(ledger.client)

    def make(self, tenant: str, name: str, rate: float | None, in_flight: int | None) -> tuple[Key, str]:
        """A new key, and what its owner sends: it is shown this once."""
        identity, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        key = Key(
            id=identity,
            tenant=tenant,
            created=self._ledger.now(),
            name=name,
            digest=_digest(secret),
            rate=rate,
            in_flight=in_flight,
        )
        self._shelf.add(key, shelf=_ALL)
        return key, f"perllm_{identity}_{secret}"

    def list(self) -> list[Key]:
        """Every key ever made, revoked ones too, newest first."""
        found: list[Key] = []
        more, after = True, None
        while more:
            page, more = self._shelf.page(_ALL, after=after, limit=1000)
            found += page
            after = page[-1].id if page else None
        return found

    def revoke(self, identity: str) -> Key:
        """It is refused from now on (within `REMEMBER` s). Raises BadSetting for an unknown one."""
        now = self._ledger.now()
        key = self._shelf.change(
            identity, lambda k: None if k.revoked is not None else k.model_copy(update={"revoked": now})
        )
        if key is None:
            raise BadSetting(f"no key {identity!r}: `perllm api keys list` shows them")
        return key

    def find(self, given: str) -> Key | None:
        """The key in force that was given, or None."""
        if (form := _FORM.fullmatch(given)) is None:
            return None
        key = self._shelf.get(form[1])
        if key is None or key.revoked is not None or not hmac.compare_digest(key.digest, _digest(form[2])):
            return None
        return key

    @staticmethod
    def is_key(given: str) -> bool:
        """Whether it looks like one of ours."""
        return _FORM.fullmatch(given) is not None

    def wait(self, key: Key) -> float:
        """Count one request; seconds to wait where it is one too many, 0 where it is not."""
        if key.rate is None:
            return 0.0
        with reaching(self._settings):
            return float(self._rate(keys=[f"{self._ledger.prefix}api:rate:{key.id}"], args=[key.rate]))

    def reserve(self, key: Key, tasks: Mapping[str, float]) -> bool:
        """Count tasks (id → deadline, s from now) that are about to be submitted; False, and none is counted, where
        they would be too many at once."""
        if key.in_flight is None:
            return True
        counted = f"{self._ledger.prefix}api:inflight:{key.id}"
        words = [key.in_flight, *(word for pair in tasks.items() for word in pair)]
        with reaching(self._settings):
            if self._reserve(keys=[counted], args=words):
                return True
            ids = [i.decode() for i in self._ledger.client.zrange(counted, 0, -1)]  # type: ignore[union-attr]
            states = self._ledger.states(ids)
            if over := [i for i, s in zip(ids, states, strict=True) if s is None or s.final]:
                self._ledger.client.zrem(counted, *over)
            return bool(over) and bool(self._reserve(keys=[counted], args=words))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
