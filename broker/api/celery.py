"""`celery -A perllm.broker.api worker`: delivers webhooks.

The queue `webhooks` carries delivery leases (`webhooks/leases.py`); what is to be delivered, and when, is stored in
`webhooks/store.py`.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import structlog
from celery import signals

from perllm.broker import connection, extras, logs
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.errors import PerLLMError, exit_with
from perllm.broker.ledger import Ledger
from perllm.broker.queues import control
from perllm.broker.queues.app import configuration, lazy_app
from perllm.broker.settings import load_settings

try:
    from perllm.broker.api.webhooks.dispatcher import DELIVER
    from perllm.broker.api.webhooks.leases import MAX_LEASES, WORK_TIME, DeliveryLease
    from perllm.broker.api.webhooks.post import ATTEMPT_TIMEOUT, connections, post
    from perllm.broker.api.webhooks.store import BACKOFF, QUEUE, Webhooks
except ModuleNotFoundError as error:
    exit_with(extras.lacking("the worker of webhooks", error, "api"))

#: Posts to one webhook at once.
CONCURRENT_POSTS = 2

log = structlog.get_logger(__name__)


class _WebhookWorker:
    """What it works with, made when Celery asks how it is configured."""

    def configure(self) -> dict[str, Any]:
        """Raises PerLLMError."""
        self.settings = load_settings(ApiSettings)
        self.webhooks = Webhooks(ApiStore(self.settings), Ledger(self.settings))
        signals.celeryd_init.connect(self._configure_logs, weak=False)
        signals.setup_logging.connect(self._configure_logs, weak=False)
        signals.worker_init.connect(self._check_server, weak=False)
        return configuration(self.settings, queue=QUEUE, concurrency=MAX_LEASES)

    def _configure_logs(self, **_: Any) -> None:
        logs.configure(self.settings)

    def _check_server(self, **_: Any) -> None:
        control.restrict(None)
        try:
            connection.check(self.settings)
        except PerLLMError as error:
            exit_with(error)


_worker = _WebhookWorker()
app = lazy_app(_worker.configure)


@app.task(name=DELIVER)
def deliver(webhook: str, tenant: str, until: float) -> str:
    """Post what is due to a webhook. Returns a line for people (Flower shows it)."""
    lease = DeliveryLease(webhook, tenant, until)
    posted, failed = asyncio.run(_deliver(_worker.settings, _worker.webhooks, lease))
    return f"{posted - failed} delivered, {failed} failed"


async def _deliver(settings: ApiSettings, webhooks: Webhooks, lease: DeliveryLease) -> tuple[int, int]:
    """Attempts made and attempts failed under the lease, which is released then."""
    began, posted, failed = time.monotonic(), 0, 0
    async with connections(settings.webhook_allow, settings.webhook_dns) as pool:
        # What is begun must be done before the lease ends: another may follow it.
        while time.monotonic() - began < WORK_TIME and webhooks.holds(lease, spare=2 * ATTEMPT_TIMEOUT):
            due = webhooks.next_due(lease, CONCURRENT_POSTS)
            if due is None:
                break
            webhook, deliveries = due
            attempts = await asyncio.gather(*(post(pool, webhook, delivery) for delivery in deliveries))
            for delivery, attempt in zip(deliveries, attempts, strict=True):
                pause = BACKOFF[delivery.tries] * random.uniform(1, 1.2) if delivery.tries < len(BACKOFF) else None
                webhooks.record_attempt(webhook, delivery, attempt, retry_in=pause)
                log.info("webhook_attempt", delivery=delivery.id, status=attempt["status"], error=attempt["error"])
                posted, failed = posted + 1, failed + (attempt["error"] is not None)
    webhooks.release(lease)
    return posted, failed
