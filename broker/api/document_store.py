"""Small documents in Redis, each a tenant's: files, batches, webhooks and their deliveries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import redis
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from perllm.broker.connection import reaching
from perllm.broker.errors import field_errors
from perllm.broker.ledger import Ledger
from perllm.broker.settings import Settings

log = structlog.get_logger(__name__)


class Document(BaseModel):
    """What is kept. Times are in s since the epoch, the Redis server's clock."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    tenant: str
    created: float


D = TypeVar("D", bound=Document)


class DocumentStore(Generic[D]):
    """The documents of one kind. One that cannot be read is logged, and as if it were not there.

    api:<kind>:<id>        string  the document, JSON
    api:<kind>s:<tenant>   zset    the tenant's documents by the time they were made; `shelf` instead of a tenant's
                                   name may group them otherwise
    """

    def __init__(self, settings: Settings, ledger: Ledger, kind: str, model: type[D]) -> None:
        self._settings, self._kind, self._model = settings, kind, model
        self._prefix = f"{ledger.prefix}api:"
        self.client = ledger.client

    def _key(self, identity: str) -> str:
        return f"{self._prefix}{self._kind}:{identity}"

    def _index(self, shelf: str) -> str:
        return f"{self._prefix}{self._kind}s:{shelf}"

    def _read(self, identity: str, raw: bytes | None) -> D | None:
        if raw is None:
            return None
        try:
            return self._model.model_validate_json(raw)
        except ValidationError as error:
            log.warning("document_unreadable", kind=self._kind, id=identity, reason=field_errors(error))
            return None

    def add(self, document: D, *, shelf: str | None = None, keep: float | None = None, most: int | None = None) -> None:
        """Keep a new document, for `keep` s at most; of its shelf's, only the newest `most`."""
        index = self._index(shelf or document.tenant)
        with reaching(self._settings):
            pipe = self.client.pipeline()
            pipe.set(self._key(document.id), document.model_dump_json(), px=int(keep * 1000) if keep else None)
            pipe.zadd(index, {document.id: document.created})
            if most is not None:
                pipe.zremrangebyrank(index, 0, -most - 1)
            if keep is not None:
                pipe.zremrangebyscore(index, "-inf", document.created - keep)
            pipe.execute()

    def get(self, identity: str, tenant: str | None = None) -> D | None:
        """The document, if there is one and it is this tenant's (None: whosever it is)."""
        with reaching(self._settings):
            raw = cast("bytes | None", self.client.get(self._key(identity)))
        document = self._read(identity, raw)
        return document if document is not None and tenant in (None, document.tenant) else None

    def many(self, identities: Sequence[str]) -> list[D]:
        """Those of these documents that are there and can be read."""
        found: list[D] = []
        for start in range(0, len(identities), 500):
            with reaching(self._settings):
                keys = [self._key(i) for i in identities[start : start + 500]]
                rows = cast("list[bytes | None]", self.client.mget(keys))
            for key, row in zip(keys, rows, strict=True):
                try:
                    found += [self._model.model_validate_json(row)] if row is not None else []
                except ValidationError:  # it must not hide the others
                    log.warning("document_unreadable", key=key)
        return found

    def change(self, identity: str, change: Callable[[D], D | None], *, keep: float | None = None) -> D | None:
        """Replace a document by what `change` makes of it (None: leave it), as one step. Returns what is there then."""
        with reaching(self._settings), self.client.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(self._key(identity))  # type: ignore[no-untyped-call]
                    raw = cast("bytes | None", pipe.get(self._key(identity)))
                    old = self._read(identity, raw)
                    if old is None:
                        return None
                    new = change(old)
                    if new is None:
                        return old
                    pipe.multi()
                    if keep is None:
                        pipe.set(self._key(identity), new.model_dump_json(), keepttl=True)
                    else:
                        pipe.set(self._key(identity), new.model_dump_json(), px=int(keep * 1000))
                    pipe.execute()
                    return new
                except redis.exceptions.WatchError:
                    continue

    def known(self, identities: Sequence[str]) -> set[str]:
        """Which of these there are."""
        with reaching(self._settings):
            pipe = self.client.pipeline(transaction=False)
            for identity in identities:
                pipe.exists(self.key(identity))
            return {identity for identity, there in zip(identities, pipe.execute(), strict=True) if there}

    def key(self, identity: str) -> str:
        """Where a document is, for who watches it."""
        return self._key(identity)

    def remove(self, document: D, *, shelf: str | None = None) -> None:
        """Forget a document."""
        with reaching(self._settings):
            pipe = self.client.pipeline()
            pipe.delete(self._key(document.id))
            pipe.zrem(self._index(shelf or document.tenant), document.id)
            pipe.execute()

    def page(self, shelf: str, *, after: str | None, limit: int, newest: bool = True) -> tuple[list[D], bool]:
        """Up to `limit` documents that follow `after`, and whether more follow."""
        index = self._index(shelf)
        found: list[D] = []
        with reaching(self._settings):
            start = 0
            if after is not None:
                rank = self.client.zrevrank(index, after) if newest else self.client.zrank(index, after)
                if rank is None:
                    return [], False
                start = cast(int, rank) + 1
            while len(found) <= limit:
                ids = cast("list[bytes]", self.client.zrange(index, start, start + limit, desc=newest))
                if not ids:
                    break
                start += len(ids)
                names = [i.decode(errors="replace") for i in ids]
                rows = cast("list[bytes | None]", self.client.mget([self._key(name) for name in names]))
                if gone := [i for i, row in zip(ids, rows, strict=True) if row is None]:
                    self.client.zrem(index, *gone)  # expired
                    start -= len(gone)
                read = (self._read(name, row) for name, row in zip(names, rows, strict=True))
                found += [document for document in read if document is not None]
        return found[:limit], len(found) > limit
