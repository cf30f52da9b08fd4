"""API keys: made, listed and revoked by `perllm api keys`, kept as digests, each good for one tenant.

A key is `perllm_<id>_<secret>`. The secret has 256 random bits, so its plain SHA-256 gives nothing away and needs no
salt.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, cast

from pydantic import Field, ValidationError

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.api.store import ApiStore
from perllm.broker.connection import reaching
from perllm.broker.errors import BadSetting, field_errors
from perllm.broker.functions import Function
from perllm.broker.ledger import Ledger
from perllm.broker.messages import MAX_NAME, MAX_VALUE, Name

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


# As many of these lines of a batch, in order, as the key's rate and its unfinished tasks leave room for: those counted
# before are free. Half of a rate's burst stays for requests.
_ADMIT = Function(
    "admit",
    """
local clock = redis.call('TIME')
local now, rate, most = clock[1] + clock[2] / 1e6, tonumber(ARGV[1]), tonumber(ARGV[2])
local due, left = now, math.huge
if rate > 0 then
    due = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
    left = math.floor((math.max(0.5, 1 / rate) - (due - now)) * rate + 1e-6)
end
if most > 0 then redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now) end
local held = most > 0 and redis.call('ZCARD', KEYS[2]) or -math.huge
local taken = 0
for i = 3, #ARGV, 2 do
    if not redis.call('ZSCORE', KEYS[2], ARGV[i]) then
        if left < 1 or held >= most then break end
        left, held, due = left - 1, held + 1, due + (rate > 0 and 1 / rate or 0)
        if most > 0 then redis.call('ZADD', KEYS[2], now + ARGV[i + 1] + 60, ARGV[i]) end
    end
    taken = taken + 1
end
if rate > 0 and due > now then
    redis.call('SET', KEYS[1], string.format('%.6f', due), 'PX', math.ceil((due - now) * 1000) + 1000)
end
return taken
""",
)
#: Counted tasks of which the state is asked for to find some that have ended, drawn at random where there are more.
_SAMPLE = 1000


class Key(Document):
    """A key less its secret. `rate` is in requests per s, `in_flight` in unfinished tasks; None: no limit. `max_value`
    is the highest value its tasks may have; 1 for a key from before there was such a limit. An `operator`'s also opens
    what is told of all tenants together: `/metrics`."""

    tenant: Name
    name: Annotated[str, Field(max_length=MAX_NAME)]
    digest: str
    rate: float | None = None
    in_flight: int | None = None
    max_value: Annotated[float, Field(gt=0, le=MAX_VALUE)] = 1.0
    operator: bool = False
    revoked: float | None = None


class Keys:
    """All keys, and what each has used.

    api:rate:<key>      string  when the key's next request would be due at its rate (GCRA), s since the epoch
    api:inflight:<key>  zset    its unfinished tasks by when they count no longer
    """

    def __init__(self, store: ApiStore, ledger: Ledger) -> None:
        self._store, self._ledger = store, ledger
        self._settings = store.settings
        self._documents: DocumentStore[Key] = DocumentStore(store, "key", Key)
        self._rate = _RATE.on(store.client)
        self._admit = _ADMIT.on(store.client)
        self._reserve = _RESERVE.on(store.client)

    def make(
        self,
        tenant: str,
        name: str,
        rate: float | None,
        in_flight: int | None,
        max_value: float = 1.0,
        *,
        operator: bool = False,
    ) -> tuple[Key, str]:
        """A new key, and the text its owner sends, which cannot be had again. Raises BadSetting."""
        identity, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        try:
            key = Key(
                id=identity,
                tenant=tenant,
                created=self._store.now(),
                name=name,
                digest=_digest(secret),
                rate=rate,
                in_flight=in_flight,
                max_value=max_value,
                operator=operator,
            )
        except ValidationError as error:
            raise BadSetting(field_errors(error)) from None
        self._documents.add(key, index=_ALL)
        return key, f"perllm_{identity}_{secret}"

    def list(self) -> list[Key]:
        """Every key ever made, revoked ones too, newest first."""
        found: list[Key] = []
        more, after = True, None
        while more:
            page, more = self._documents.page(_ALL, after=after, limit=1000)
            found += page
            after = page[-1].id if page else None
        return found

    def revoke(self, identity: str) -> Key:
        """Refuse it from now on (within `callers.CACHE_TIME` s). Raises BadSetting for an unknown one."""
        now = self._store.now()
        key = self._documents.change(
            identity, lambda k: None if k.revoked is not None else k.model_copy(update={"revoked": now})
        )
        if key is None:
            raise BadSetting(f"no key {identity!r}: `perllm api keys list` shows them")
        return key

    def find(self, given: str) -> Key | None:
        """The key in force that was given, or None."""
        if (form := _FORM.fullmatch(given)) is None:
            return None
        key = self._documents.get(form[1])
        if key is None or key.revoked is not None or not hmac.compare_digest(key.digest, _digest(form[2])):
            return None
        return key

    @staticmethod
    def is_key(given: str) -> bool:
        """Whether it has a key's form."""
        return _FORM.fullmatch(given) is not None

    def wait(self, key: Key) -> float:
        """Count one request; seconds to wait where it is one too many, 0 where it is not."""
        if key.rate is None:
            return 0.0
        with reaching(self._settings):
            return float(self._rate(keys=[self._store.key("rate", key.id)], args=[key.rate]))

    def reserve(self, key: Key, tasks: Mapping[str, float]) -> bool:
        """Count tasks (id → deadline, s from now) that are about to be submitted; False, and none is counted, where
        they would be too many at once."""
        if key.in_flight is None:
            return True
        counted = self._store.key("inflight", key.id)
        arguments: list[float | str] = [key.in_flight, *_pairs(tasks)]
        with reaching(self._settings):
            if self._reserve(keys=[counted], args=arguments):
                return True
            return self._uncount_ended(counted) and bool(self._reserve(keys=[counted], args=arguments))

    def admit(self, key: Key, tasks: Mapping[str, float]) -> int:
        """Count the first of a batch's tasks (id → deadline, s from now), as many as may be submitted now; returns how
        many. Those counted before count no second time."""
        if key.in_flight is None and key.rate is None:
            return len(tasks)
        counted = self._store.key("inflight", key.id)
        arguments: list[float | str] = [key.rate or 0, key.in_flight or 0, *_pairs(tasks)]
        with reaching(self._settings):
            keys = [self._store.key("rate", key.id), counted]
            taken = int(self._admit(keys=keys, args=arguments))
            if taken < len(tasks) and key.in_flight is not None and self._uncount_ended(counted):
                taken = int(self._admit(keys=keys, args=arguments))
            return taken

    def release(self, identity: str, tasks: Sequence[str]) -> None:
        """These tasks of a key have ended."""
        if tasks:
            with reaching(self._settings):
                self._store.client.zrem(self._store.key("inflight", identity), *tasks)

    def get(self, identity: str) -> Key | None:
        """A key by its id."""
        return self._documents.get(identity)

    def _uncount_ended(self, counted: str) -> bool:
        """Stop counting tasks that have ended; whether there were any."""
        ids = [i.decode() for i in cast("list[bytes]", self._store.client.zrandmember(counted, _SAMPLE))]
        states = self._ledger.states(ids)
        if over := [i for i, s in zip(ids, states, strict=True) if s is None or s.final]:
            self._store.client.zrem(counted, *over)
        return bool(over)


def _pairs(tasks: Mapping[str, float]) -> list[float | str]:
    return [argument for pair in tasks.items() for argument in pair]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
