"""Small documents in Redis, each a tenant's: files, batches, webhooks and their deliveries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import redis
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from perllm.broker.api.store import ApiStore
from perllm.broker.connection import reaching
from perllm.broker.errors import field_errors

log = structlog.get_logger(__name__)


class Document(BaseModel):
    """What is stored. Times are in s since the epoch, the Redis server's clock."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    tenant: str
    created: float


D = TypeVar("D", bound=Document)


class DocumentStore(Generic[D]):
    """The documents of one kind. One that cannot be read is logged, and as if it were not there.

    api:<kind>:<id>        string  the document, JSON
    api:<kind>s:<index>    zset    ids of documents by the time they were made; the index is the document's tenant,
                                   unless another is given: a delivery's is its webhook
    """

    def __init__(self, store: ApiStore, kind: str, model: type[D]) -> None:
        self._store, self._kind, self._model = store, kind, model
        self._settings, self._client = store.settings, store.client

    def key(self, identity: str) -> str:
        """Where a document is, for transactions that watch or write it."""
        return self._store.key(self._kind, identity)

    def index_key(self, index: str) -> str:
        """Where an index is, for the same."""
        return self._store.key(f"{self._kind}s", index)

    def _read(self, identity: str, raw: bytes | None) -> D | None:
        if raw is None:
            return None
        try:
            return self._model.model_validate_json(raw)
        except ValidationError as error:
            log.warning("document_unreadable", kind=self._kind, id=identity, reason=field_errors(error))
            return None

    def add(
        self, document: D, *, index: str | None = None, lasts: float | None = None, newest: int | None = None
    ) -> None:
        """Keep a new document, for `lasts` s at most; in its index, only the `newest` so many."""
        indexed = self.index_key(index or document.tenant)
        with reaching(self._settings):
            pipe = self._client.pipeline()
            pipe.set(self.key(document.id), document.model_dump_json(), px=int(lasts * 1000) if lasts else None)
            pipe.zadd(indexed, {document.id: document.created})
            if newest is not None:
                pipe.zremrangebyrank(indexed, 0, -newest - 1)
            if lasts is not None:
                pipe.zremrangebyscore(indexed, "-inf", document.created - lasts)
            pipe.execute()

    def get(self, identity: str, tenant: str | None = None) -> D | None:
        """The document, if there is one and it is this tenant's (None: any tenant's)."""
        with reaching(self._settings):
            raw = cast("bytes | None", self._client.get(self.key(identity)))
        document = self._read(identity, raw)
        return document if document is not None and tenant in (None, document.tenant) else None

    def many(self, identities: Sequence[str]) -> list[D]:
        """Those of these documents that exist and can be read."""
        found: list[D] = []
        for start in range(0, len(identities), 500):
            some = identities[start : start + 500]
            with reaching(self._settings):
                rows = cast("list[bytes | None]", self._client.mget([self.key(i) for i in some]))
            read = (self._read(identity, row) for identity, row in zip(some, rows, strict=True))
            found += [document for document in read if document is not None]
        return found

    def change(self, identity: str, change: Callable[[D], D | None], *, lasts: float | None = None) -> D | None:
        """Replace a document by what `change` makes of it (None: leave it), as one step. Returns the document as it is
        then, None where there is none."""
        key = self.key(identity)
        with reaching(self._settings), self._client.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(key)  # type: ignore[no-untyped-call]
                    old = self._read(identity, cast("bytes | None", pipe.get(key)))
                    if old is None:
                        return None
                    new = change(old)
                    if new is None:
                        return old
                    pipe.multi()
                    if lasts is None:
                        pipe.set(key, new.model_dump_json(), keepttl=True)
                    else:
                        pipe.set(key, new.model_dump_json(), px=int(lasts * 1000))
                    pipe.execute()
                    return new
                except redis.exceptions.WatchError:
                    continue

    def known(self, identities: Sequence[str]) -> set[str]:
        """Which of these exist."""
        with reaching(self._settings):
            pipe = self._client.pipeline(transaction=False)
            for identity in identities:
                pipe.exists(self.key(identity))
            return {identity for identity, exists in zip(identities, pipe.execute(), strict=True) if exists}

    def count(self, index: str) -> int:
        """How many documents an index holds."""
        with reaching(self._settings):
            return self._client.zcard(self.index_key(index))

    def remove(self, document: D, *, index: str | None = None) -> None:
        """Forget a document."""
        with reaching(self._settings):
            pipe = self._client.pipeline()
            pipe.delete(self.key(document.id))
            pipe.zrem(self.index_key(index or document.tenant), document.id)
            pipe.execute()

    def page(self, index: str, *, after: str | None, limit: int, newest: bool = True) -> tuple[list[D], bool]:
        """Up to `limit` documents of an index that follow `after`, and whether more follow."""
        indexed = self.index_key(index)
        found: list[D] = []
        with reaching(self._settings):
            start = 0
            if after is not None:
                rank = self._client.zrevrank(indexed, after) if newest else self._client.zrank(indexed, after)
                if rank is None:
                    return [], False
                start = cast(int, rank) + 1
            while len(found) <= limit:
                ids = cast("list[bytes]", self._client.zrange(indexed, start, start + limit, desc=newest))
                if not ids:
                    break
                start += len(ids)
                names = [i.decode(errors="replace") for i in ids]
                rows = cast("list[bytes | None]", self._client.mget([self.key(name) for name in names]))
                if gone := [i for i, row in zip(ids, rows, strict=True) if row is None]:
                    self._client.zrem(indexed, *gone)  # expired
                    start -= len(gone)
                read = (self._read(name, row) for name, row in zip(names, rows, strict=True))
                found += [document for document in read if document is not None]
        return found[:limit], len(found) > limit
