"""What is kept of webhooks: where to post what, and every delivery with its attempts.

A delivery rests here until it is done. Celery carries turns: leave for a worker to post, for a few seconds, what waits
for one webhook. A webhook has one turn at a time, and a turn ends by itself: so nothing is sent twice while it is on
its way, a lost message costs a minute, and waiting hours for the next attempt costs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections import Counter, deque
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, cast
from uuid import uuid4

import structlog
from pydantic import Field, ValidationError
from redis.exceptions import WatchError

from perllm.broker.api.document_store import Document, DocumentStore
from perllm.broker.api.webhooks.health import Health
from perllm.broker.connection import reaching
from perllm.broker.ledger import Ledger
from perllm.broker.settings import Settings

#: The queue that turns travel by.
QUEUE = "webhooks"
#: Webhooks of one tenant; its pending deliveries, shared equally among its webhooks; its final ones that are kept; and
#: for how long, s.
MOST_HOOKS, MOST_PENDING, MOST_DELIVERIES, KEPT = 20, 10_000, 2000, 7 * 86_400.0
#: Bytes of one payload: without its largest fields, if it must be.
MOST_PAYLOAD = 16 << 10
#: Attempts of one delivery that are kept.
MOST_ATTEMPTS = 20
#: Seconds before each further attempt, and up to a fifth more: nine hours in all.
BACKOFF = (5, 30, 120, 600, 1800, 3600, 7200, 18_000)
#: Turns at once in the whole cell; seconds in which a turn begins attempts, and after which it is over, whatever became
#: of whoever had it.
TURNS, TURN, LEASE = 32, 5.0, 60.0
#: Webhooks that are looked at for the next turns. More than those of all tenants that could have their share already.
_LOOK = 1000

log = structlog.get_logger(__name__)


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


class Turn(NamedTuple):
    """Leave to post what waits for a webhook. `until`, s since the epoch, tells it from every other turn."""

    hook: str
    tenant: str
    until: float


def share(due: Iterable[tuple[str, str]], busy: Collection[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """Which of the webhooks (id and tenant) that are due get a turn while `busy` ones have theirs and `most` may.

    The tenant with the fewest turns comes first, of several who has waited longest. None gets more than a quarter of
    what is still free, or one: so however many receivers of however many tenants hang, others find a free one.
    """
    turns = Counter(tenant for _, tenant in busy)
    waiting: dict[str, deque[str]] = {}
    for hook, tenant in due:
        if (hook, tenant) not in busy:
            waiting.setdefault(tenant, deque()).append(hook)
    chosen: list[tuple[str, str]] = []
    while waiting and (free := most - len(busy) - len(chosen)) > 0:
        tenant = min(waiting, key=lambda t: turns[t])
        if turns[tenant] >= max(1, free // 4):
            break
        chosen.append((waiting[tenant].popleft(), tenant))
        turns[tenant] += 1
        if not waiting[tenant]:
            del waiting[tenant]
    return chosen


class Webhooks:
    """Every tenant's webhooks.

    api:webhook-tenants           set     tenants that have any
    api:webhook-position          string  how far the event stream has been told of
    api:webhooks-due              zset    webhooks for which something waits, by when they may have a turn
    api:webhook-turns             zset    those that have one, by when it is over
    api:webhooks-dropped          hash    events not made into deliveries, by webhook
    api:deliveries-due:<webhook>  zset    its pending deliveries by when they are due
    api:deliveries-done:<tenant>  zset    the tenant's final deliveries by when they became so
    """

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings, self._ledger = settings, ledger
        self.shelf: DocumentStore[WebhookDocument] = DocumentStore(settings, ledger, "webhook", WebhookDocument)
        self.deliveries: DocumentStore[DeliveryDocument] = DocumentStore(settings, ledger, "delivery", DeliveryDocument)
        self._tenants = f"{ledger.prefix}api:webhook-tenants"
        self._position = f"{ledger.prefix}api:webhook-position"
        self._due = f"{ledger.prefix}api:webhooks-due"
        self._turns = f"{ledger.prefix}api:webhook-turns"
        self._dropped = f"{ledger.prefix}api:webhooks-dropped"

    def _waiting(self, hook_id: str) -> str:
        return f"{self._ledger.prefix}api:deliveries-due:{hook_id}"

    def _done(self, tenant: str) -> str:
        return f"{self._ledger.prefix}api:deliveries-done:{tenant}"

    # --- webhooks

    def make(self, tenant: str, url: str, events: list[str]) -> WebhookDocument | None:
        """A new webhook; None where the tenant has as many as it may."""
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
            if self.shelf.page(tenant, after=None, limit=MOST_HOOKS)[1]:  # counted with it: others may be made just now
                self.shelf.remove(hook)
                return None
            self._ledger.client.sadd(self._tenants, tenant)
        return hook

    def of(self, tenant: str) -> list[WebhookDocument]:
        """A tenant's webhooks, newest first."""
        return self.shelf.page(tenant, after=None, limit=MOST_HOOKS)[0]

    def remove(self, hook: WebhookDocument) -> None:
        """Forget a webhook, and all that was or is to be delivered to it."""
        self.shelf.remove(hook)
        self._go_on(hook.id, hook.tenant)
        with reaching(self._settings):
            self._ledger.client.hdel(self._dropped, hook.id)
        while page := self.deliveries.page(hook.id, after=None, limit=500)[0]:
            for delivery in page:
                self.deliveries.remove(delivery, shelf=hook.id)
        if not self.of(hook.tenant):
            with reaching(self._settings):
                self._ledger.client.srem(self._tenants, hook.tenant)

    def enable(self, hook: WebhookDocument) -> WebhookDocument | None:
        """Post to it as if it had never failed, what has waited meanwhile first. None where it is gone."""
        enabled = self.shelf.change(hook.id, lambda h: h.model_copy(update={"health": Health()}))
        if enabled is not None:
            self._go_on(hook.id, hook.tenant)
        return enabled

    def dropped(self, hooks: list[WebhookDocument]) -> list[int]:
        """Events each of these was not told of, since too much was waiting."""
        with reaching(self._settings):
            counts = self._ledger.client.hmget(self._dropped, [hook.id for hook in hooks]) if hooks else []
        return [int(count or 0) for count in cast("list[bytes | None]", counts)]

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
        often it is announced. Where too much waits already it is dropped, and counted."""
        hooks = self.of(tenant)
        wanted = [hook for hook in hooks if event in hook.events and not hook.health.disabled]
        if not wanted:
            return
        event_id = f"evt_{hashlib.sha256(f'{event} {subject}'.encode()).hexdigest()[:32]}"
        ids = [f"dlv_{hashlib.sha256(f'{hook.id} {event_id}'.encode()).hexdigest()[:32]}" for hook in wanted]
        known = self.deliveries.known(ids)
        now = self._ledger.now()
        payload = _payload(event, now, data)
        with reaching(self._settings):
            pipe = self._ledger.client.pipeline()
            for hook in wanted:
                pipe.zcard(self._waiting(hook.id))
            for hook, identity, waiting in zip(wanted, ids, pipe.execute(), strict=True):
                if identity not in known:
                    if waiting >= MOST_PENDING // len(hooks):
                        pipe.hincrby(self._dropped, hook.id, 1)
                        continue
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
                    most = MOST_PENDING + MOST_DELIVERIES
                    self.deliveries.add(delivery, shelf=hook.id, keep=KEPT, most=most)
                pipe.zadd(self._waiting(hook.id), {identity: now}, nx=True)  # a known one's maker may have died here
                pipe.zadd(self._due, {_member(hook): max(now, hook.health.until)}, lt=True)
            pipe.execute()

    def replay(self, hook: WebhookDocument, delivery: DeliveryDocument) -> DeliveryDocument | None:
        """Deliver it again, from the first try on."""
        now = self._ledger.now()
        again = self.deliveries.change(
            delivery.id, lambda d: d.model_copy(update={"state": "pending", "tries": 0, "next": now})
        )
        if again is not None:
            with reaching(self._settings):
                pipe = self._ledger.client.pipeline()
                pipe.zrem(self._done(hook.tenant), delivery.id)
                pipe.zadd(self._waiting(hook.id), {delivery.id: now})
                pipe.zadd(self._due, {_member(hook): max(now, hook.health.until)}, lt=True)
                pipe.execute()
        return again

    # --- turns

    def give_turns(self) -> list[Turn]:
        """Who may post now. A turn that is given must be sent to a worker; one that is lost ends by itself."""
        now = self._ledger.now()
        with reaching(self._settings):
            pipe = self._ledger.client.pipeline(transaction=False)
            pipe.zremrangebyscore(self._turns, "-inf", now)
            pipe.zrange(self._turns, 0, -1)
            pipe.llen(QUEUE)
            pipe.zrangebyscore(self._due, "-inf", now, 0, _LOOK)
            _, having, unread, due = pipe.execute()
            busy = {_named(member) for member in having}
            unheard = max(0, unread - len(busy))  # messages of turns that are over: nobody has read them for so long
            chosen = share([_named(member) for member in due], busy, TURNS - unheard)
            for hook, tenant in chosen:
                pipe.zadd(self._turns, {f"{hook} {tenant}": now + LEASE}, nx=True)
            added = pipe.execute()
        return [Turn(*who, now + LEASE) for who, new in zip(chosen, added, strict=True) if new]

    def in_turn(self, turn: Turn, spare: float) -> bool:
        """Whether the turn has not ended, and will not within so many s."""
        with reaching(self._settings):
            until = self._ledger.client.zscore(self._turns, f"{turn.hook} {turn.tenant}")
        return until == turn.until and self._ledger.now() + spare < turn.until

    def next_due(self, turn: Turn, most: int) -> tuple[WebhookDocument, list[DeliveryDocument]] | None:
        """The webhook whose turn it is, and what is to be posted to it now, oldest first; one thing only where that is
        a probe. None: nothing for now."""
        now = self._ledger.now()
        hook = self._readable(self.shelf, turn.hook)
        if hook is None or hook.health.state(now) in ("open", "disabled"):
            return None
        if hook.health.state(now) == "half-open":
            most = 1
        waiting, found = self._waiting(hook.id), list[DeliveryDocument]()
        with reaching(self._settings):
            while len(found) < most:
                ids = self._ledger.client.zrangebyscore(waiting, "-inf", now, len(found), most - len(found))
                if not ids:
                    break
                for identity in (raw.decode() for raw in cast("list[bytes]", ids)):
                    delivery = self._readable(self.deliveries, identity)
                    if delivery is not None and delivery.state == "pending":
                        found.append(delivery)
                    else:  # forgotten, or settled by one who died before he could say so here
                        self._ledger.client.zrem(waiting, identity)
        return (hook, found) if found else None

    def _readable(self, shelf: DocumentStore[Any], identity: str) -> Any:
        try:
            return shelf.get(identity)
        except ValidationError as error:  # one bad record must not keep others from being delivered
            log.error("unreadable_record", id=identity, reason=str(error)[:200])
            return None

    def settle(
        self, hook: WebhookDocument, delivery: DeliveryDocument, attempt: dict[str, Any], *, again: float | None
    ) -> None:
        """Note an attempt: delivered, or to be tried again in so many s, or given up (None)."""
        now = self._ledger.now()
        good = attempt["error"] is None
        following = None if good or again is None else now + again
        state: Literal["pending", "delivered", "failed"] = (
            "delivered" if good else "failed" if following is None else "pending"
        )
        noted = self.deliveries.change(
            delivery.id,
            lambda d: d.model_copy(
                update={
                    "attempts": [*d.attempts, attempt][-MOST_ATTEMPTS:],
                    "tries": d.tries + 1,
                    "state": state,
                    "next": following,
                }
            ),
        )
        with reaching(self._settings):
            if noted is not None and following is not None:
                self._ledger.client.zadd(self._waiting(hook.id), {delivery.id: following}, xx=True)
            else:
                self._ledger.client.zrem(self._waiting(hook.id), delivery.id)
        if noted is not None and following is None:
            self._keep_newest(hook.tenant, delivery.id, now)
        if not good or hook.health != Health():
            self._note_health(hook, attempt, now)

    def _keep_newest(self, tenant: str, delivery_id: str, now: float) -> None:
        done = self._done(tenant)
        with reaching(self._settings):
            self._ledger.client.zadd(done, {delivery_id: now})
            oldest = cast("list[bytes]", self._ledger.client.zrange(done, 0, -MOST_DELIVERIES - 1))
            for identity in oldest:
                if (old := self._readable(self.deliveries, identity.decode())) is not None:
                    self.deliveries.remove(old, shelf=old.webhook)
                self._ledger.client.zrem(done, identity)

    def _note_health(self, hook: WebhookDocument, attempt: dict[str, Any], now: float) -> None:
        def note(known: WebhookDocument) -> WebhookDocument | None:
            health = known.health.after(attempt["error"], attempt["took"], now)
            return known.model_copy(update={"health": health}) if health != known.health else None

        self.shelf.change(hook.id, note)

    def end_turn(self, turn: Turn) -> None:
        """Whoever had it has done what there was to do, or has had his time."""
        if not self.in_turn(turn, 0):
            return
        self._go_on(turn.hook, turn.tenant)
        with reaching(self._settings):
            self._ledger.client.zrem(self._turns, f"{turn.hook} {turn.tenant}")

    def _go_on(self, hook_id: str, tenant: str) -> None:
        """Note when the webhook may have its next turn, if anything waits."""
        waiting, member = self._waiting(hook_id), f"{hook_id} {tenant}"
        with reaching(self._settings), self._ledger.client.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(waiting, self.shelf.key(hook_id))  # type: ignore[no-untyped-call]
                    hook = self._readable(self.shelf, hook_id)
                    first = cast("list[tuple[bytes, float]]", pipe.zrange(waiting, 0, 0, withscores=True))
                    pipe.multi()
                    if hook is None:
                        pipe.delete(waiting)
                    if hook is None or hook.health.disabled or not first:
                        pipe.zrem(self._due, member)
                    else:
                        pipe.zadd(self._due, {member: max(first[0][1], hook.health.until)})
                    pipe.execute()
                    return
                except WatchError:
                    continue


def _member(hook: WebhookDocument) -> str:
    return f"{hook.id} {hook.tenant}"


def _named(member: bytes) -> tuple[str, str]:
    hook, _, tenant = member.decode().partition(" ")
    return hook, tenant


def _payload(event: str, now: float, data: dict[str, Any]) -> str:
    """What is posted. Fields that would make it too long are left out, the largest first, and named."""
    stamp = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
    left, omitted = dict(data), list[str]()
    while True:
        told = left | ({"omitted": omitted} if omitted else {})
        whole = json.dumps({"type": event, "timestamp": stamp, "data": told}, ensure_ascii=False)
        raw = whole.encode(errors="replace")  # half of a surrogate pair is no text
        if len(raw) <= MOST_PAYLOAD or not left:
            return raw.decode()
        largest = max(left, key=lambda field: len(json.dumps(left[field])))
        omitted.append(largest)
        del left[largest]
