"""Webhooks as they are stored: where to post what, and every delivery with its attempts.

A delivery is stored here until it is done. Celery's queue `webhooks` carries leases only (see `leases`).
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
from redis.exceptions import WatchError

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.api.store import ApiStore
from perllm.broker.api.webhooks.health import Health
from perllm.broker.api.webhooks.leases import LEASE_TIME, MAX_LEASES, DeliveryLease, share
from perllm.broker.connection import reaching
from perllm.broker.ledger import Ledger

#: The queue that leases travel by.
QUEUE = "webhooks"
#: Webhooks of one tenant.
MAX_WEBHOOKS = 20
#: A tenant's pending deliveries, shared equally among its webhooks, and its final ones that are kept.
MAX_PENDING, MAX_FINAL = 10_000, 2000
#: Seconds a delivery is kept.
DELIVERY_TIME = 7 * 86_400.0
#: Bytes of one payload: without its largest fields, if it must be.
MAX_PAYLOAD = 16 << 10
#: Attempts of one delivery that are kept.
MAX_ATTEMPTS = 20
#: Seconds before each further attempt, and up to a fifth more: nine hours in all.
BACKOFF = (5, 30, 120, 600, 1800, 3600, 7200, 18_000)
#: How an attempt ends: delivered, failed and to be tried again, or failed for good.
OUTCOMES = ("delivered", "failed", "given_up")
#: Due webhooks looked at for the next leases: more than those of all tenants that could have their share already.
_CANDIDATES = 1000


class WebhookDocument(Document):
    """A webhook. The secret signs, so it cannot be kept as a digest; it is shown once and never again."""

    url: str
    events: list[str]
    secret: str = Field(repr=False)
    health: Health = Health()


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

    api:webhook-tenants           set     tenants that have any
    api:webhook-position          string  where in the ledger's event stream to go on
    api:webhooks-due              zset    webhooks with pending deliveries, by when they may have a lease
    api:webhook-leases            zset    those that have one, by when it ends
    api:webhooks-dropped          hash    events not made into deliveries, by webhook
    api:webhook-totals            hash    attempts `delivered`, `failed` (to be tried again) and `given_up`, and events
                                          `dropped`: ever, of all
    api:deliveries-due:<webhook>  zset    its pending deliveries by when they are due
    api:deliveries-done:<tenant>  zset    the tenant's final deliveries by when they became so
    """

    def __init__(self, store: ApiStore, ledger: Ledger) -> None:
        self._store, self._client, self._settings, self._ledger = store, store.client, store.settings, ledger
        self.documents: DocumentStore[WebhookDocument] = DocumentStore(store, "webhook", WebhookDocument)
        self.deliveries: DocumentStore[DeliveryDocument] = DocumentStore(store, "delivery", DeliveryDocument)
        self._tenants = store.key("webhook-tenants")
        self._position = store.key("webhook-position")
        self._due = store.key("webhooks-due")
        self._leases = store.key("webhook-leases")
        self._dropped = store.key("webhooks-dropped")
        self._totals = store.key("webhook-totals")

    def _pending_key(self, webhook_id: str) -> str:
        return self._store.key("deliveries-due", webhook_id)

    def _final_key(self, tenant: str) -> str:
        return self._store.key("deliveries-done", tenant)

    # --- webhooks

    def make(self, tenant: str, url: str, events: list[str]) -> WebhookDocument | None:
        """A new webhook; None where the tenant has as many as it may."""
        webhook = WebhookDocument(
            id=f"wh_{uuid4().hex}",
            tenant=tenant,
            created=self._store.now(),
            url=url,
            events=events,
            secret="whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
        )
        with reaching(self._settings):
            if not self._client.scard(self._tenants):  # earlier events are for no webhook
                self._client.set(self._position, self._ledger.first_and_last_event()[1])
            self.documents.add(webhook)
            # Counted with the new one: others may be made at the same time.
            if self.documents.page(tenant, after=None, limit=MAX_WEBHOOKS)[1]:
                self.documents.remove(webhook)
                return None
            self._client.sadd(self._tenants, tenant)
        return webhook

    def of(self, tenant: str) -> list[WebhookDocument]:
        """A tenant's webhooks, newest first."""
        return self.documents.page(tenant, after=None, limit=MAX_WEBHOOKS)[0]

    def remove(self, webhook: WebhookDocument) -> None:
        """Forget a webhook, and all that was or is to be delivered to it."""
        self.documents.remove(webhook)
        self._update_due(webhook.id, webhook.tenant)
        with reaching(self._settings):
            self._client.hdel(self._dropped, webhook.id)
        while page := self.deliveries.page(webhook.id, after=None, limit=500)[0]:
            for delivery in page:
                self.deliveries.remove(delivery, index=webhook.id)
        if not self.of(webhook.tenant):
            with reaching(self._settings):
                self._client.srem(self._tenants, webhook.tenant)

    def enable(self, webhook: WebhookDocument) -> WebhookDocument | None:
        """Post to it as if it had never failed, what has waited meanwhile first. None where it is gone."""
        enabled = self.documents.change(webhook.id, lambda h: h.model_copy(update={"health": Health()}))
        if enabled is not None:
            self._update_due(webhook.id, webhook.tenant)
        return enabled

    def dropped(self, webhooks: list[WebhookDocument]) -> list[int]:
        """Events that did not become deliveries of each of these, since too many were pending."""
        with reaching(self._settings):
            counts = self._client.hmget(self._dropped, [webhook.id for webhook in webhooks]) if webhooks else []
        return [int(count or 0) for count in cast("list[bytes | None]", counts)]

    def attempts(self) -> dict[str, int]:
        """Attempts ever, of all webhooks: delivered, failed to be tried again, given up."""
        with reaching(self._settings):
            counts = self._client.hmget(self._totals, list(OUTCOMES))
        return dict(zip(OUTCOMES, (int(n or 0) for n in cast("list[bytes | None]", counts)), strict=True))

    def dropped_ever(self) -> int:
        """Events ever that became no delivery, of all webhooks."""
        with reaching(self._settings):
            return int(cast("bytes | None", self._client.hget(self._totals, "dropped")) or 0)

    def tenants(self) -> set[str]:
        """Tenants that have webhooks."""
        with reaching(self._settings):
            return {t.decode() for t in cast("set[bytes]", self._client.smembers(self._tenants))}

    def position(self) -> str:
        """Where in the event stream to go on."""
        with reaching(self._settings):
            raw = cast("bytes | None", self._client.get(self._position))
        return raw.decode() if raw else "0-0"

    def advance(self, position: str) -> None:
        """Every event up to here has been made into deliveries."""
        with reaching(self._settings):
            self._client.set(self._position, position)

    # --- deliveries

    def add_event(self, tenant: str, event: str, subject: str, data: dict[str, Any]) -> None:
        """Make deliveries of an event to those of the tenant's webhooks that ask for such. The same event of the same
        subject is delivered once, however often it is added. Where too many are pending it is dropped, and counted."""
        webhooks = self.of(tenant)
        asking = [webhook for webhook in webhooks if event in webhook.events and not webhook.health.disabled]
        if not asking:
            return
        event_id = f"evt_{hashlib.sha256(f'{event} {subject}'.encode()).hexdigest()[:32]}"
        ids = [f"dlv_{hashlib.sha256(f'{webhook.id} {event_id}'.encode()).hexdigest()[:32]}" for webhook in asking]
        known = self.deliveries.known(ids)
        now = self._store.now()
        payload = _payload(event, event_id, now, data)
        with reaching(self._settings):
            pipe = self._client.pipeline()
            for webhook in asking:
                pipe.zcard(self._pending_key(webhook.id))
            for webhook, identity, pending in zip(asking, ids, pipe.execute(), strict=True):
                if identity not in known:
                    if pending >= MAX_PENDING // len(webhooks):
                        pipe.hincrby(self._dropped, webhook.id, 1)
                        pipe.hincrby(self._totals, "dropped", 1)
                        continue
                    delivery = DeliveryDocument(
                        id=identity,
                        tenant=webhook.tenant,
                        created=now,
                        webhook=webhook.id,
                        event=event,
                        event_id=event_id,
                        payload=payload,
                        next=now,
                    )
                    newest = MAX_PENDING + MAX_FINAL
                    self.deliveries.add(delivery, index=webhook.id, lasts=DELIVERY_TIME, newest=newest)
                # A known one's, too: whatever made it may have died here.
                pipe.zadd(self._pending_key(webhook.id), {identity: now}, nx=True)
                pipe.zadd(self._due, {_member(webhook): max(now, webhook.health.until)}, lt=True)
            pipe.execute()

    def replay(self, webhook: WebhookDocument, delivery: DeliveryDocument) -> DeliveryDocument | None:
        """Deliver it again, from the first try on."""
        now = self._store.now()
        again = self.deliveries.change(
            delivery.id, lambda d: d.model_copy(update={"state": "pending", "tries": 0, "next": now})
        )
        if again is not None:
            with reaching(self._settings):
                pipe = self._client.pipeline()
                pipe.zrem(self._final_key(webhook.tenant), delivery.id)
                pipe.zadd(self._pending_key(webhook.id), {delivery.id: now})
                pipe.zadd(self._due, {_member(webhook): max(now, webhook.health.until)}, lt=True)
                pipe.execute()
        return again

    # --- leases

    def grant_leases(self) -> list[DeliveryLease]:
        """New leases. Each must be sent to a worker; one that is lost ends by itself."""
        now = self._store.now()
        with reaching(self._settings):
            pipe = self._client.pipeline(transaction=False)
            pipe.zremrangebyscore(self._leases, "-inf", now)
            pipe.zrange(self._leases, 0, -1)
            pipe.llen(QUEUE)
            pipe.zrangebyscore(self._due, "-inf", now, 0, _CANDIDATES)
            _, leased_members, unread, due = pipe.execute()
            leased = {_parse_member(member) for member in leased_members}
            stale = max(0, unread - len(leased))  # messages of leases that have ended: no worker reads them
            chosen = share([_parse_member(member) for member in due], leased, MAX_LEASES - stale)
            for webhook_id, tenant in chosen:
                pipe.zadd(self._leases, {f"{webhook_id} {tenant}": now + LEASE_TIME}, nx=True)
            added = pipe.execute()
        return [DeliveryLease(*which, now + LEASE_TIME) for which, new in zip(chosen, added, strict=True) if new]

    def holds(self, lease: DeliveryLease, spare: float) -> bool:
        """Whether the lease has not ended, and will not within so many s."""
        with reaching(self._settings):
            until = self._client.zscore(self._leases, f"{lease.webhook} {lease.tenant}")
        return until == lease.until and self._store.now() + spare < lease.until

    def next_due(self, lease: DeliveryLease, limit: int) -> tuple[WebhookDocument, list[DeliveryDocument]] | None:
        """The leased webhook and what is to be posted to it now, oldest first; one delivery only where that is a probe.
        None: nothing for now."""
        now = self._store.now()
        webhook = self.documents.get(lease.webhook)
        if webhook is None or webhook.health.state(now) in ("open", "disabled"):
            return None
        if webhook.health.state(now) == "half-open":
            limit = 1
        pending, found = self._pending_key(webhook.id), list[DeliveryDocument]()
        with reaching(self._settings):
            while len(found) < limit:
                ids = self._client.zrangebyscore(pending, "-inf", now, len(found), limit - len(found))
                if not ids:
                    break
                for identity in (raw.decode() for raw in cast("list[bytes]", ids)):
                    delivery = self.deliveries.get(identity)
                    if delivery is not None and delivery.state == "pending":
                        found.append(delivery)
                    else:  # forgotten, or made final by a worker that died before it could remove it here
                        self._client.zrem(pending, identity)
        return (webhook, found) if found else None

    def release(self, lease: DeliveryLease) -> None:
        """End a lease: what was due is posted, or its time is used up."""
        if not self.holds(lease, 0):
            return
        self._update_due(lease.webhook, lease.tenant)
        with reaching(self._settings):
            self._client.zrem(self._leases, f"{lease.webhook} {lease.tenant}")

    def _update_due(self, webhook_id: str, tenant: str) -> None:
        """Write when the webhook may have its next lease, if any delivery is pending."""
        pending, member = self._pending_key(webhook_id), f"{webhook_id} {tenant}"
        with reaching(self._settings), self._client.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(pending, self.documents.key(webhook_id))  # type: ignore[no-untyped-call]
                    webhook = self.documents.get(webhook_id)
                    first = cast("list[tuple[bytes, float]]", pipe.zrange(pending, 0, 0, withscores=True))
                    pipe.multi()
                    if webhook is None:
                        pipe.delete(pending)
                    if webhook is None or webhook.health.disabled or not first:
                        pipe.zrem(self._due, member)
                    else:
                        pipe.zadd(self._due, {member: max(first[0][1], webhook.health.until)})
                    pipe.execute()
                    return
                except WatchError:
                    continue

    # --- attempts

    def record_attempt(
        self,
        webhook: WebhookDocument,
        delivery: DeliveryDocument,
        attempt: dict[str, Any],
        *,
        retry_in: float | None,
    ) -> None:
        """Record an attempt: the delivery is delivered, or due again in so many s, or given up (None)."""
        now = self._store.now()
        delivered = attempt["error"] is None
        due = None if delivered or retry_in is None else now + retry_in
        state: Literal["pending", "delivered", "failed"] = (
            "delivered" if delivered else "failed" if due is None else "pending"
        )
        changed = self.deliveries.change(
            delivery.id,
            lambda d: d.model_copy(
                update={
                    "attempts": [*d.attempts, attempt][-MAX_ATTEMPTS:],
                    "tries": d.tries + 1,
                    "state": state,
                    "next": due,
                }
            ),
        )
        with reaching(self._settings):
            outcome = "delivered" if delivered else "given_up" if due is None else "failed"
            self._client.hincrby(self._totals, outcome, 1)
            if changed is not None and due is not None:
                self._client.zadd(self._pending_key(webhook.id), {delivery.id: due}, xx=True)
            else:
                self._client.zrem(self._pending_key(webhook.id), delivery.id)
        if changed is not None and due is None:
            self._keep_newest(webhook.tenant, delivery.id, now)
        if not delivered or webhook.health != Health():
            self._update_health(webhook, attempt, now)

    def _keep_newest(self, tenant: str, delivery_id: str, now: float) -> None:
        final = self._final_key(tenant)
        with reaching(self._settings):
            self._client.zadd(final, {delivery_id: now})
            oldest = cast("list[bytes]", self._client.zrange(final, 0, -MAX_FINAL - 1))
            for identity in oldest:
                if (old := self.deliveries.get(identity.decode())) is not None:
                    self.deliveries.remove(old, index=old.webhook)
                self._client.zrem(final, identity)

    def _update_health(self, webhook: WebhookDocument, attempt: dict[str, Any], now: float) -> None:
        def update(known: WebhookDocument) -> WebhookDocument | None:
            health = known.health.after(attempt["error"], attempt["took"], now)
            return known.model_copy(update={"health": health}) if health != known.health else None

        self.documents.change(webhook.id, update)


def _member(webhook: WebhookDocument) -> str:
    return f"{webhook.id} {webhook.tenant}"


def _parse_member(member: bytes) -> tuple[str, str]:
    webhook, _, tenant = member.decode().partition(" ")
    return webhook, tenant


def _payload(event: str, event_id: str, now: float, data: dict[str, Any]) -> str:
    """What is posted: one of OpenAI's events, with `timestamp` for readers of Standard Webhooks'. Fields that make
    it too long are left out, the largest first, and named."""
    stamp = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
    head = {"id": event_id, "object": "event", "type": event, "created_at": int(now), "timestamp": stamp}
    left, omitted = dict(data), list[str]()
    while True:
        shown = left | ({"omitted": omitted} if omitted else {})
        whole = json.dumps({**head, "data": shown}, ensure_ascii=False)
        raw = whole.encode(errors="replace")  # half of a surrogate pair is no text
        if len(raw) <= MAX_PAYLOAD or not left:
            return raw.decode()
        largest = max(left, key=lambda field: len(json.dumps(left[field])))
        omitted.append(largest)
        del left[largest]
