"""`celery -A perllm.broker.api worker`: delivers webhooks.

The queue `webhooks` carries delivery leases (`webhooks/leases.py`); what is to be delivered, and when, is stored in
`webhooks/store.py`. The app is made when Celery asks this module for `app`, not when the module is imported.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from typing import Any

import structlog
from celery import Celery, signals

from perllm.broker import connection, logs
from perllm.broker.api.settings import ApiSettings
from perllm.broker.api.store import ApiStore
from perllm.broker.api.webhooks.dispatcher import DELIVER
from perllm.broker.api.webhooks.leases import MAX_LEASES, WORK_TIME, DeliveryLease
from perllm.broker.api.webhooks.post import ATTEMPT_TIMEOUT, connections, post
from perllm.broker.api.webhooks.store import BACKOFF, QUEUE, Webhooks
from perllm.broker.ledger import Ledger
from perllm.broker.queues.app import make_app, start_or_exit
from perllm.broker.settings import load_settings

#: Posts to one webhook at once.
CONCURRENT_POSTS = 2

log = structlog.get_logger(__name__)


def __getattr__(name: str) -> Celery:
    if name == "app":
        return start_or_exit(webhook_worker)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def webhook_worker() -> Celery:
    """The Celery app of a webhook worker. Raises BadSetting."""
    settings = load_settings(ApiSettings)
    webhooks = Webhooks(ApiStore(settings), Ledger(settings))
    app = make_app(settings, queue=QUEUE, concurrency=MAX_LEASES)

    def configure_logs(**_: Any) -> None:
        logs.configure(settings)

    def check_server(**_: Any) -> None:
        start_or_exit(lambda: connection.check(settings))

    signals.setup_logging.connect(configure_logs, weak=False)  # nothing else keeps these functions alive
    signals.worker_init.connect(check_server, weak=False)

    @app.task(name=DELIVER)
    def deliver(webhook: str, tenant: str, until: float) -> str:
        """Post what is due to a webhook. Returns a line for people (Flower shows it)."""
        posted, failed = asyncio.run(_deliver(settings, webhooks, DeliveryLease(webhook, tenant, until)))
        return f"{posted - failed} delivered, {failed} failed"

    return app


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
