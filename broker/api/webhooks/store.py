"""What is kept of webhooks: where to post what, and every delivery with its attempts.

A delivery rests here until it is done; Celery only carries its id to whoever posts it. So a lost message costs a
minute, and waiting hours for the next attempt costs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from datetime import UTC, datetime
from typing import Any, Literal, cast
from uuid import uuid4

from pydantic import Field

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.connection import reaching
from perllm.broker.ledger import Ledger
from perllm.broker.settings import Settings

#: Webhooks of one tenant; deliveries kept of each, and for how long, s.
MOST_HOOKS = 20
MOST_DELIVERIES, KEPT = 1000, 7 * 86_400.0
#: Seconds before each further attempt, and up to a fifth more: nine hours in all.
BACKOFF = (5, 30, 120, 600, 1800, 3600, 7200, 18_000)
#: Seconds after which a delivery that was sent out and not heard of is sent out again.
RESEND = 60.0


class WebhookDocument(Document):
    """A webhook. The secret signs, so it cannot be kept as a digest; it is shown once and never again."""

    url: str
    events: list[str]
    secret: str = Field(repr=False)


class DeliveryDocument(Document):
    """One event for one webhook. `tries` counts attempts since it was made or replayed; `next` is when the next is
    due."""

    webhook: str
    event: str
    event_id: str
    payload: str
    state: Literal["pending", "delivered", "failed"] = "pending"
    attempts: list[dict[str, Any]] = Field(default_factory=list)
    tries: int = 0
    next: float | None = None


class Webhooks:
    """Every tenant's webhooks.

    api:webhook-tenants    set     tenants that have any
    api:webhook-position   string  how far the event stream has been told of
    api:deliveries-due     zset    pending deliveries by when they are to be sent out
    """

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self.shelf: DocumentStore[WebhookDocument] = DocumentStore(settings, ledger, "webhook", WebhookDocument)
        self.deliveries: DocumentStore[DeliveryDocument] = DocumentStore(settings, ledger, "delivery", DeliveryDocument)
        self._tenants = f"{ledger.prefix}api:webhook-tenants"
        self._position = f"{ledger.prefix}api:webhook-position"
        self._due = f"{ledger.prefix}api:deliveries-due"

    # --- webhooks

    def make(self, tenant: str, url: str, events: list[str]) -> WebhookDocument | None:
        """A new webhook; None where the tenant has as many as it may."""
        if len(self.of(tenant)) >= MOST_HOOKS:
            return None
        hook = WebhookDocument(
            id=f"wh_{uuid4().hex}",
            tenant=tenant,
            created=self._ledger.now(),
            url=url,
            events=events,
            secret="whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
        )
        with reaching(self._settings):
            if not self._ledger.client.scard(self._tenants):  # what happened before nobody wanted to know
                self._ledger.client.set(self._position, self._ledger.first_and_last_event()[1])
            self.shelf.add(hook)
            self._ledger.client.sadd(self._tenants, tenant)
        return hook

    def of(self, tenant: str) -> list[WebhookDocument]:
        """A tenant's webhooks, newest first."""
        return self.shelf.page(tenant, after=None, limit=MOST_HOOKS)[0]

    def remove(self, hook: WebhookDocument) -> None:
        """Forget a webhook; what is still to be delivered to it is dropped."""
        self.shelf.remove(hook)
        if not self.of(hook.tenant):
            with reaching(self._settings):
                self._ledger.client.srem(self._tenants, hook.tenant)

    def tenants(self) -> set[str]:
        """Tenants that have webhooks."""
        with reaching(self._settings):
            return {t.decode() for t in cast("set[bytes]", self._ledger.client.smembers(self._tenants))}

    def position(self) -> str:
        """Where in the event stream to go on."""
        with reaching(self._settings):
            raw = cast("bytes | None", self._ledger.client.get(self._position))
        return raw.decode() if raw else "0-0"

    def advance(self, position: str) -> None:
        """Everything up to here has been told of."""
        with reaching(self._settings):
            self._ledger.client.set(self._position, position)

    # --- deliveries

    def announce(self, tenant: str, event: str, subject: str, data: dict[str, Any]) -> None:
        """Have an event delivered to whoever wants it. The same event of the same subject is delivered once, however
        often it is announced."""
        event_id = f"evt_{hashlib.sha256(f'{event} {subject}'.encode()).hexdigest()[:32]}"
        now = self._ledger.now()
        stamp = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
        payload = json.dumps({"type": event, "timestamp": stamp, "data": data}, ensure_ascii=False)
        for hook in self.of(tenant):
            if event in hook.events:
                identity = f"dlv_{hashlib.sha256(f'{hook.id} {event_id}'.encode()).hexdigest()[:32]}"
                self._add(hook, identity, event, event_id, payload, now)

    def _add(self, hook: WebhookDocument, identity: str, event: str, event_id: str, payload: str, now: float) -> None:
        if self.deliveries.get(identity) is not None:
            return
        delivery = DeliveryDocument(
            id=identity,
            tenant=hook.tenant,
            created=now,
            webhook=hook.id,
            event=event,
            event_id=event_id,
            payload=payload,
            next=now,
        )
        self.deliveries.add(delivery, shelf=hook.id, keep=KEPT, most=MOST_DELIVERIES)
        self._schedule(identity, now)

    def _schedule(self, identity: str, at: float) -> None:
        with reaching(self._settings):
            self._ledger.client.zadd(self._due, {identity: at})

    def take_due(self, most: int) -> list[str]:
        """Deliveries to be sent out now. Each is due again after `RESEND`, unless something becomes of it."""
        now = self._ledger.now()
        with reaching(self._settings):
            raw = self._ledger.client.zrangebyscore(self._due, "-inf", now, 0, most)
            ids = [i.decode() for i in cast("list[bytes]", raw)]
            if ids:
                self._ledger.client.zadd(self._due, dict.fromkeys(ids, now + RESEND))
        return ids

    def settle(self, delivery: DeliveryDocument, attempt: dict[str, Any], *, again: float | None) -> None:
        """Note an attempt: delivered, or to be tried again in so many s, or given up (None)."""
        good = attempt["error"] is None
        following = None if good or again is None else self._ledger.now() + again
        state: Literal["pending", "delivered", "failed"] = (
            "delivered" if good else "failed" if following is None else "pending"
        )
        self.deliveries.change(
            delivery.id,
            lambda d: d.model_copy(
                update={
                    "attempts": [*d.attempts, attempt][-50:],
                    "tries": d.tries + 1,
                    "state": state,
                    "next": following,
                }
            ),
        )
        if following is None:
            self.drop(delivery.id)
        else:
            self._schedule(delivery.id, following)

    def drop(self, identity: str) -> None:
        """A delivery is not to be sent out any more."""
        with reaching(self._settings):
            self._ledger.client.zrem(self._due, identity)

    def replay(self, delivery: DeliveryDocument) -> DeliveryDocument | None:
        """Deliver it again, from the first try on."""
        now = self._ledger.now()
        again = self.deliveries.change(
            delivery.id, lambda d: d.model_copy(update={"state": "pending", "tries": 0, "next": now})
        )
        self._schedule(delivery.id, now)
        return again
