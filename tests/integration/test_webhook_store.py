"""Webhooks as they are stored: events become deliveries, deliveries are tried until they are final."""

from __future__ import annotations

import pytest

from perllm.broker.api.store import ApiStore
from perllm.broker.api.webhooks.leases import DeliveryLease
from perllm.broker.api.webhooks.store import BACKOFF, MAX_WEBHOOKS, DeliveryDocument, Webhooks
from perllm.broker.ledger import Ledger


@pytest.fixture
def webhooks(ledger: Ledger, store: ApiStore) -> Webhooks:
    return Webhooks(store, ledger)


def failed(error: str | None = "HTTP 500") -> dict[str, object]:
    return {"at": 0.0, "status": 500, "error": error, "took": 0.1}


def test_an_event_is_delivered_once_however_often_it_is_added(webhooks: Webhooks) -> None:
    webhook = webhooks.make("t", "http://example.com", ["task.failed"])
    assert webhook is not None
    for event, subject in (("task.failed", "a"), ("task.failed", "a"), ("task.succeeded", "a"), ("task.failed", "b")):
        webhooks.add_event("t", event, subject, {"id": subject})
    webhooks.add_event("another", "task.failed", "a", {})
    found, _ = webhooks.deliveries.page(webhook.id, after=None, limit=10)
    assert sorted((d.event, '"id": "a"' in d.payload) for d in found) == [("task.failed", False), ("task.failed", True)]
    (lease,) = webhooks.grant_leases()
    assert sorted(d.id for d in due(webhooks, lease)) == sorted(d.id for d in found)
    assert webhooks.grant_leases() == []  # it has its lease; were that lost, there would be another in a minute


def due(webhooks: Webhooks, lease: DeliveryLease) -> list[DeliveryDocument]:
    found = webhooks.next_due(lease, 10)
    return found[1] if found else []


def test_a_delivery_is_tried_again_given_up_and_replayed(webhooks: Webhooks) -> None:
    webhook = webhooks.make("t", "http://example.com", ["task.failed"])
    assert webhook is not None
    webhooks.add_event("t", "task.failed", "a", {})
    ((delivery,), _) = webhooks.deliveries.page(webhook.id, after=None, limit=10)

    def now() -> DeliveryDocument:
        found = webhooks.deliveries.get(delivery.id)
        assert found is not None
        return found

    for tries, pause in enumerate(BACKOFF, start=1):
        webhooks.record_attempt(webhook, now(), failed(), retry_in=pause)
        assert (now().state, now().tries) == ("pending", tries)
        assert now().next == pytest.approx(webhooks._store.now() + pause, abs=5)
    assert sum(BACKOFF) > 8 * 3600
    webhooks.record_attempt(webhook, now(), failed(), retry_in=None)
    assert now().state == "failed"
    assert len(now().attempts) == len(BACKOFF) + 1
    webhooks.replay(webhook, now())
    assert (now().state, now().tries) == ("pending", 0)
    webhooks.enable(webhook)
    (lease,) = webhooks.grant_leases()
    assert [d.id for d in due(webhooks, lease)] == [delivery.id]
    webhooks.record_attempt(webhook, now(), failed(None), retry_in=5)
    assert now().state == "delivered"
    assert webhooks.attempts() == {"delivered": 1, "failed": len(BACKOFF), "given_up": 1}


def test_a_tenant_has_so_many_webhooks_and_no_more(webhooks: Webhooks) -> None:
    for _ in range(MAX_WEBHOOKS):
        assert webhooks.make("t", "http://example.com", ["task.failed"]) is not None
    assert webhooks.make("t", "http://example.com", ["task.failed"]) is None
    assert webhooks.tenants() == {"t"}
    for webhook in webhooks.of("t"):
        assert webhook.secret not in repr(webhook)
        webhooks.remove(webhook)
    assert webhooks.tenants() == set()
