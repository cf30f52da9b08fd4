"""All API processes of a cell keep files in one store, or a file made by one would not be found by the next.

Each makes its store known on the server for as long as it runs; one that would keep files elsewhere does not start.

api:file-stores   zset   "<store's identity> <process> <its name for people>" by until when that is known, s
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar, cast
from uuid import uuid4

import structlog

from perllm.broker.api.files.store import Files
from perllm.broker.api.store import ApiStore
from perllm.broker.connection import reaching
from perllm.broker.errors import BadSetting, Unreachable

#: Seconds for which a process's store is known, and after which that is renewed.
KNOWN, RENEWED = 15.0, 5.0
#: This process.
_PROCESS = uuid4().hex

T = TypeVar("T")

log = structlog.get_logger(__name__)


class StoreSharing:
    """This process's word of where it keeps files."""

    def __init__(self, store: ApiStore, files: Files) -> None:
        self._store, self._files, self._key = store, files, store.key("file-stores")
        self._ending = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="perllm-file-store")
        self._member = f"{files.identity} {_PROCESS} {files.name}"

    def begin(self) -> None:
        """Make it known. Raises BadSetting where another process keeps files elsewhere, and Unreachable."""
        if other := self._other():
            raise BadSetting(
                f"PERLLM_API_FILES: another HTTP API of this cell keeps files in {other}, this one would in "
                f"{self._files.name}, and neither would find the other's: set it to one place for both, a folder that "
                f"both mount or a store (s3://bucket/folder), or stop the other and wait {KNOWN:g} s"
            )
        self._tell()

    async def keep_known(self) -> None:
        """Renew it, until `end`."""
        told = False
        while not self._ending.is_set():
            try:
                await self._apart(self._tell)
                other = await self._apart(self._other)
                if other and not told:  # both began at once, or the server was away
                    log.error("file_stores_differ", here=self._files.name, other=other)
                told = other is not None
            except Unreachable as error:
                log.warning("file_store_not_told", reason=str(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), RENEWED)
        with suppress(Unreachable):
            await self._apart(self._forget)

    async def _apart(self, call: Callable[[], T]) -> T:
        """What a call to the server returns, made in a thread of our own (see `threads`)."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def end(self) -> None:
        """This process is going: `keep_known` ends with it no longer known."""
        self._ending.set()

    def _forget(self) -> None:
        with reaching(self._store.settings):
            self._store.client.zrem(self._key, self._member)

    def _tell(self) -> None:
        now = self._store.now()
        with reaching(self._store.settings):
            pipe = self._store.client.pipeline()
            pipe.zremrangebyscore(self._key, "-inf", now)
            pipe.zadd(self._key, {self._member: now + KNOWN})
            pipe.expire(self._key, round(KNOWN))
            pipe.execute()

    def _other(self) -> str | None:
        """The name of another store that a living process uses."""
        now = self._store.now()
        with reaching(self._store.settings):
            members = cast("list[bytes]", self._store.client.zrange(self._key, f"({now}", "+inf", byscore=True))
        for identity, _, name in (member.decode().split(" ", 2) for member in members):
            if identity != self._files.identity:
                return name
        return None
