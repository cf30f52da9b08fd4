"""What one API process holds: connections, stores, limits, background workers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from perllm.broker.api.batches.runner import BatchRunner
from perllm.broker.api.batches.store import Batches
from perllm.broker.api.callers import Callers
from perllm.broker.api.files.store import Files
from perllm.broker.api.keys import Keys
from perllm.broker.api.request_limits import MEMORY_SHARES
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.api.submission import Tasks
from perllm.broker.api.threads import TenantThreadPool
from perllm.broker.api.waiting import ConcurrencyLimit, Results
from perllm.broker.api.webhooks.dispatcher import WebhookDispatcher
from perllm.broker.api.webhooks.store import Webhooks
from perllm.broker.client import AsyncClient

#: Uploads at once, and with one key.
MAX_UPLOADS, MAX_UPLOADS_PER_KEY = 32, 8
#: Seconds an answer of `/ready` is reused.
READINESS_AGE = 1.0


class Api:
    """One API process's state. To be made in the event loop that uses it."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.client = AsyncClient(settings=settings)
        self.ledger = self.client.ledger
        self.store = ApiStore(settings)
        # Threads for calls of milliseconds; for lists and other long calls; for reading and writing files.
        self.quick = TenantThreadPool("quick", threads=8, per_tenant=4, max_waiting=2000, timeout=60.0)
        self.slow = TenantThreadPool("slow", threads=4, per_tenant=1, max_waiting=32, timeout=60.0)
        self.disk = TenantThreadPool("files", threads=8, per_tenant=2, max_waiting=64, timeout=600.0)
        keys = Keys(self.store, self.ledger)
        self.callers = Callers(settings, keys, self.quick)
        self.tasks = Tasks(settings, self.client, keys, self.quick)
        self.results = Results(self.client)
        self.waits = ConcurrencyLimit(
            settings.api_waiting, settings.api_waiting_per_key, "streams and waits for results"
        )
        memory = settings.api_body_memory
        of_one = max(memory // MEMORY_SHARES, settings.max_result_bytes)
        self.embeddings = ConcurrencyLimit(max(memory, of_one), of_one, "bytes of embeddings")
        self.uploads = ConcurrencyLimit(MAX_UPLOADS, MAX_UPLOADS_PER_KEY, "uploads")
        self.files = Files(settings, self.store)
        self.batches = Batches(self.store)
        self.webhooks = Webhooks(self.store, self.ledger)
        self.webhook_dispatcher = WebhookDispatcher(settings, self.store, self.ledger, self.webhooks)
        self.batch_runner = BatchRunner(
            settings, self.store, self.ledger, self.files, self.batches, keys, self.webhook_dispatcher.batch_ended
        )
        self.address_checks: Counter[str] = Counter()  # of webhooks' addresses under way, by tenant
        self._missing: list[str] = []
        self._checked, self._checking = float("-inf"), asyncio.Lock()

    async def readiness(self) -> list[str]:
        """What is missing before tasks can be done. It needs no key, so it is looked up once a second at most."""
        async with self._checking:
            if time.monotonic() > self._checked + READINESS_AGE:
                led, nodes = await self.quick.run("", lambda: (self.ledger.led(), bool(self.ledger.nodes())))
                self._missing = [what for what, there in (("scheduler", led), ("node", nodes)) if not there]
                self._checked = time.monotonic()
        return self._missing

    def start(self) -> None:
        """Begin the background work."""
        self.batch_runner.start()
        self.webhook_dispatcher.start()

    async def close(self) -> None:
        """Let go of leases, threads and connections."""
        workers = (("a", self.batch_runner), ("b", self.webhook_dispatcher))  # as of two tenants: both at once
        await asyncio.gather(*(self.slow.run(name, worker.close) for name, worker in workers))
        await self.results.close()
        await self.client.close()
        self.store.close()
        for pool in (self.quick, self.slow, self.disk):
            pool.close()
