"""`celery -A broker.api worker`: delivers webhooks. The queue `webhooks` carries ids; what is to be delivered, and
when, rests in `webhook_store`."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import structlog
from celery import signals

from broker import connection, control, logs
from broker.api.herald import DELIVER, QUEUE
from broker.api.webhook_post import post
from broker.api.webhook_store import BACKOFF, Webhooks
from broker.celery_app import make_app
from broker.errors import PerLLMError
from broker.ledger import Ledger
from broker.settings import load_settings

#: Deliveries at once.
CONCURRENCY = 8

log = structlog.get_logger(__name__)

try:
    settings = load_settings()
    _hooks = Webhooks(settings, Ledger(settings))
except PerLLMError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)

app = make_app(settings, queue=QUEUE, concurrency=CONCURRENCY)


@signals.setup_logging.connect
def _log(**_: Any) -> None:
    logs.configure(settings)


@signals.worker_init.connect
def _check(**_: Any) -> None:
    control.restrict(None)
    try:
        connection.check(settings)
    except PerLLMError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@app.task(name=DELIVER)
def deliver(delivery_id: str) -> str:
    """Make one attempt; a failed one is due again later. Returns a line for people (Flower shows it)."""
    delivery = _hooks.deliveries.get(delivery_id)
    hook = _hooks.shelf.get(delivery.webhook) if delivery is not None else None
    if delivery is None or hook is None or delivery.state != "pending":
        _hooks.drop(delivery_id)
        return "void: delivered, given up or no longer wanted"
    attempt = asyncio.run(post(hook, delivery, settings.webhook_allow))
    again = BACKOFF[delivery.tries] * random.uniform(1, 1.2) if delivery.tries < len(BACKOFF) else None
    _hooks.settle(delivery, attempt, again=again)
    log.info("webhook_attempt", delivery=delivery_id, status=attempt["status"], error=attempt["error"])
    return f"{delivery.event}: {attempt['error'] or 'delivered'}"
