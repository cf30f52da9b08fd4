"""`celery -A perllm.broker.api worker`: delivers webhooks. The queue `webhooks` carries turns; what is to be delivered, and
when, rests in `webhook_store`."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Any

import structlog
from celery import signals

from perllm.broker import connection, logs
from perllm.broker.api.webhooks.dispatcher import DELIVER
from perllm.broker.api.webhooks.post import PATIENCE, connections, post
from perllm.broker.api.webhooks.store import BACKOFF, QUEUE, TURN, TURNS, Turn, Webhooks
from perllm.broker.errors import PerLLMError
from perllm.broker.ledger import Ledger
from perllm.broker.queues.app import make_app
from perllm.broker.settings import load_settings

#: Posts to one webhook at once.
AT_ONCE = 2

log = structlog.get_logger(__name__)

try:
    settings = load_settings()
    _hooks = Webhooks(settings, Ledger(settings))
except PerLLMError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)

app = make_app(settings, queue=QUEUE, concurrency=TURNS)


@signals.setup_logging.connect
def _log(**_: Any) -> None:
    logs.configure(settings)


@signals.worker_init.connect
def _check(**_: Any) -> None:
    try:
        connection.check(settings)
    except PerLLMError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@app.task(name=DELIVER)
def deliver(hook: str, tenant: str, until: float) -> str:
    """A webhook's turn: post what is due to it, for `TURN` s. Returns a line for people (Flower shows it)."""
    made, failed = asyncio.run(_take(Turn(hook, tenant, until)))
    return f"{made - failed} delivered, {failed} failed"


async def _take(turn: Turn) -> tuple[int, int]:
    began, made, failed = time.monotonic(), 0, 0
    async with connections(settings.webhook_allow, settings.webhook_dns) as pool:
        # What is begun must be done before the turn is over: another may follow it.
        while time.monotonic() - began < TURN and _hooks.in_turn(turn, spare=2 * PATIENCE):
            due = _hooks.next_due(turn, AT_ONCE)
            if due is None:
                break
            hook, deliveries = due
            attempts = await asyncio.gather(*(post(pool, hook, delivery) for delivery in deliveries))
            for delivery, attempt in zip(deliveries, attempts, strict=True):
                again = BACKOFF[delivery.tries] * random.uniform(1, 1.2) if delivery.tries < len(BACKOFF) else None
                _hooks.settle(hook, delivery, attempt, again=again)
                log.info("webhook_attempt", delivery=delivery.id, status=attempt["status"], error=attempt["error"])
                made, failed = made + 1, failed + (attempt["error"] is not None)
    _hooks.end_turn(turn)
    return made, failed
