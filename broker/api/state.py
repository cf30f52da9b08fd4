"""What one API process holds: connections, stores, limits, background workers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress

from perllm.broker.api.batches.runner import BatchRunner
from perllm.broker.api.batches.store import Batches
from perllm.broker.api.callers import Callers
from perllm.broker.api.errors import ApiError
from perllm.broker.api.files.sharing import StoreSharing
from perllm.broker.api.files.store import Files
from perllm.broker.api.keys import Keys
from perllm.broker.api.request_limits import MEMORY_SHARES
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.stopping import Stopping
from perllm.broker.api.store import ApiStore
from perllm.broker.api.submission import Tasks
from perllm.broker.api.threads import TenantThreadPool
from perllm.broker.api.waiting import ConcurrencyLimit, Results
from perllm.broker.api.webhooks.dispatcher import WebhookDispatcher
from perllm.broker.api.webhooks.store import Webhooks
from perllm.broker.client import AsyncClient
from perllm.broker.connection import NEAR_REPLY_TIMEOUT
from perllm.broker.errors import Unreachable

#: Uploads at once, and with one key.
MAX_UPLOADS, MAX_UPLOADS_PER_KEY = 32, 8
#: Seconds an answer of `/ready` is reused.
READINESS_AGE = 1.0
#: Seconds `/ready` takes at most.
READINESS_TIME = 2.0


class Api:
    """One API process's state. To be made in the event loop that uses it."""

    def __init__(self, settings: ApiSettings, stopping: Stopping) -> None:
        self.settings, self.stopping = settings, stopping
        self.client = AsyncClient(settings=settings, reply_timeout=NEAR_REPLY_TIMEOUT)
        self.ledger = self.client.ledger
        self.store = ApiStore(settings)
        # Threads for calls of milliseconds; for lists and other long calls; for reading and writing files.
        self.quick = TenantThreadPool("quick", threads=8, per_tenant=4, max_waiting=2000, timeout=15.0)
        self.slow = TenantThreadPool("slow", threads=4, per_tenant=1, max_waiting=32, timeout=30.0)
        self.disk = TenantThreadPool("files", threads=8, per_tenant=2, max_waiting=64, timeout=600.0)
        keys = Keys(self.store, self.ledger)
        self.callers = Callers(settings, keys, self.quick)
        self.tasks = Tasks(settings, self.client, keys, self.quick)
        self.results = Results(self.client, stopping)
        self.waits = ConcurrencyLimit(
            settings.api_waiting, settings.api_waiting_per_key, "streams and waits for results"
        )
        memory = settings.api_body_memory
        of_one = max(memory // MEMORY_SHARES, settings.max_result_bytes)
        self.embeddings = ConcurrencyLimit(max(memory, of_one), of_one, "bytes of embeddings")
        self.uploads = ConcurrencyLimit(MAX_UPLOADS, MAX_UPLOADS_PER_KEY, "uploads")
        self.files = Files(settings, self.store)
        self._sharing = StoreSharing(self.store, self.files)
        self._shared: asyncio.Task[None] | None = None
        self.batches = Batches(self.store)
        self.webhooks = Webhooks(self.store, self.ledger)
        self.webhook_dispatcher = WebhookDispatcher(settings, self.store, self.ledger, self.webhooks)
        self.batch_runner = BatchRunner(
            settings, self.store, self.ledger, self.files, self.batches, keys, self.webhook_dispatcher.batch_ended
        )
        self.address_checks: Counter[str] = Counter()  # of webhooks' addresses under way, by tenant
        self._check: asyncio.Task[list[str]] | None = None
        self._checked = float("-inf")

    async def readiness(self) -> list[str]:
        """What is missing before tasks can be done. It needs no key, so it is looked up once a second at most, and once
        at a time, however long that takes."""
        if self._check is None or (self._check.done() and time.monotonic() > self._checked + READINESS_AGE):
            self._check, self._checked = asyncio.create_task(self._find_missing()), time.monotonic()
        try:
            async with asyncio.timeout(READINESS_TIME):
                return await asyncio.shield(self._check)
        except TimeoutError:
            return ["server"]

    async def _find_missing(self) -> list[str]:
        looks = self.client.looks
        try:
            led, nodes = await self.quick.run("", lambda: (looks.led(), bool(looks.nodes())))
        except (Unreachable, ApiError):
            return ["server"]
        return [what for what, there in (("scheduler", led), ("node", nodes)) if not there]

    def start(self) -> None:
        """Begin the background work."""
        self.batch_runner.start()
        self.webhook_dispatcher.start()
        self._shared = asyncio.create_task(self._sharing.keep_known())

    async def close(self) -> None:
        """Let go of leases, threads and connections."""
        workers = (("a", self.batch_runner), ("b", self.webhook_dispatcher))  # as of two tenants: both at once
        await asyncio.gather(*(self.slow.run(name, worker.close) for name, worker in workers))
        self._sharing.end()
        if self._shared is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._shared, READINESS_TIME)
        await self.results.close()
        await self.client.close()
        self.store.close()
        for pool in (self.quick, self.slow, self.disk):
            pool.close()
