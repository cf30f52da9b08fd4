"""`/v1/webhooks`: which events are posted where, what was delivered, and deliveries again."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.callers import Caller
from perllm.broker.api.dependencies import TheApi, TheCaller
from perllm.broker.api.errors import ApiError, not_found
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes
from perllm.broker.api.openapi.schemas import (
    EVENTS,
    USUAL_EVENTS,
    CreatedWebhook,
    Deleted,
    DeliveryObject,
    DeliveryPage,
    WebhookObject,
    WebhookPage,
    WebhookRequest,
)
from perllm.broker.api.paging import After, Limit, page
from perllm.broker.api.request_body import read_json, refuse_unknown
from perllm.broker.api.state import Api
from perllm.broker.api.webhooks.address import Forbidden, check_url, resolve
from perllm.broker.api.webhooks.store import MAX_WEBHOOKS, DeliveryDocument, WebhookDocument

router = APIRouter(tags=["Webhooks"])

#: Seconds the check of an address may take: it asks a DNS server.
ADDRESS_TIMEOUT = 6.0
#: Checks of addresses at once, of one tenant.
MAX_ADDRESS_CHECKS = 4


@router.post(
    "/v1/webhooks",
    openapi_extra=takes(WebhookRequest, some=examples.WEBHOOK_REQUEST),
    responses=answers(CreatedWebhook, {**examples.WEBHOOK, "secret": "whsec_..."}, 408, 413),
)
async def create_webhook(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Have events posted to an address, signed as Standard Webhooks says. The secret is in this answer and in no
    other."""
    body = await read_json(request)
    refuse_unknown(body, WebhookRequest.model_fields)
    events = body.get("events", list(USUAL_EVENTS))
    if not isinstance(events, list) or not events or not all(isinstance(e, str) and e in EVENTS for e in events):
        raise ApiError(400, f"events: a list of some of {', '.join(EVENTS)} is required", param="events")
    url = await _checked_url(api, caller.tenant, body.get("url"))
    webhook = await api.quick.run(caller.tenant, api.webhooks.make, caller.tenant, url, list(dict.fromkeys(events)))
    if webhook is None:
        raise ApiError(400, f"url: there are {MAX_WEBHOOKS} webhooks already; delete one", param="url")
    return JSONResponse({**(await _webhook_objects(api, caller, [webhook]))[0], "secret": webhook.secret})


async def _checked_url(api: Api, tenant: str, url: Any) -> str:
    if not isinstance(url, str) or len(url) > 2048:
        raise ApiError(400, "url: an address of at most 2048 characters is required", param="url")
    checks: Counter[str] = api.address_checks
    if checks[tenant] >= MAX_ADDRESS_CHECKS:
        message = f"url: {MAX_ADDRESS_CHECKS} addresses are being looked up for this tenant; try again when one is done"
        raise ApiError(429, message, param="url", code="too_many_lookups", headers={"Retry-After": "1"})
    checks[tenant] += 1
    try:
        check_url(url)
        parts = urlsplit(url)
        async with asyncio.timeout(ADDRESS_TIMEOUT):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            await resolve(parts.hostname or "", port, api.settings.webhook_allow, api.settings.webhook_dns)
    except Forbidden as refused:
        raise ApiError(400, f"url: {refused}", param="url", code="url_not_allowed") from None
    except TimeoutError:
        raise ApiError(400, "url: its name was not resolved in time", param="url") from None
    finally:
        checks[tenant] -= 1
        checks += Counter()  # forgets tenants without any
    return url


@router.get("/v1/webhooks", responses=answers(WebhookPage, examples.page(examples.WEBHOOK)))
async def list_webhooks(api: TheApi, caller: TheCaller) -> Response:
    """The tenant's webhooks, newest first."""
    webhooks = await api.quick.run(caller.tenant, api.webhooks.of, caller.tenant)
    return JSONResponse(page(await _webhook_objects(api, caller, webhooks), False))


@router.get("/v1/webhooks/{id}", responses=answers(WebhookObject, examples.WEBHOOK, 404))
async def get_webhook(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A webhook less its secret. Its `health` is `closed` while its deliveries go out. After failures in a row it is
    `open`: what is to be delivered waits until `next_probe`, then is `half-open` and one delivery is tried. After three
    days without a success it is `disabled`. `reason` is the last failure, `dropped` counts the events that were
    not delivered since too many deliveries were pending."""
    return JSONResponse((await _webhook_objects(api, caller, [await _find(api, caller, id)]))[0])


@router.post("/v1/webhooks/{id}/enable", responses=answers(WebhookObject, examples.WEBHOOK, 404))
async def enable_webhook(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Post to a webhook as if it had never failed, what waits for it first: for one that was disabled, or whose
    receiver works again."""
    webhook = await api.quick.run(caller.tenant, api.webhooks.enable, await _find(api, caller, id))
    if webhook is None:
        raise not_found("webhook", id)
    api.webhook_dispatcher.wake()
    return JSONResponse((await _webhook_objects(api, caller, [webhook]))[0])


@router.delete("/v1/webhooks/{id}", responses=answers(Deleted, {**examples.DELETED, "object": "webhook"}, 404))
async def delete_webhook(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Delete a webhook; what is still to be delivered to it is dropped."""
    await api.quick.run(caller.tenant, api.webhooks.remove, await _find(api, caller, id))
    return JSONResponse({"id": id, "object": "webhook", "deleted": True})


@router.get("/v1/webhooks/{id}/deliveries", responses=answers(DeliveryPage, examples.page(examples.DELIVERY), 404))
async def list_deliveries(id: str, api: TheApi, caller: TheCaller, limit: Limit = 20, after: After = None) -> Response:
    """What was, or is still to be, delivered to a webhook in the last week, with every attempt; newest first."""
    webhook = await _find(api, caller, id)
    found, more = await api.slow.run(
        caller.tenant, partial(api.webhooks.deliveries.page, webhook.id, after=after, limit=limit)
    )
    return JSONResponse(page([_delivery_object(delivery) for delivery in found], more))


@router.post(
    "/v1/webhooks/{id}/deliveries/{delivery_id}/replay", responses=answers(DeliveryObject, examples.DELIVERY, 404, 409)
)
async def replay_delivery(id: str, delivery_id: str, api: TheApi, caller: TheCaller) -> Response:
    """Deliver something again, under the same `webhook-id`."""
    webhook = await _find(api, caller, id)
    delivery = await api.quick.run(caller.tenant, api.webhooks.deliveries.get, delivery_id, caller.tenant)
    if delivery is None or delivery.webhook != webhook.id:
        raise not_found("delivery", delivery_id)
    if webhook.health.disabled:
        raise ApiError(409, "the webhook is disabled: enable it first", code="webhook_disabled")
    again = await api.quick.run(caller.tenant, api.webhooks.replay, webhook, delivery)
    api.webhook_dispatcher.wake()
    return JSONResponse(_delivery_object(again or delivery))


async def _find(api: Api, caller: Caller, identity: str) -> WebhookDocument:
    webhook = await api.quick.run(caller.tenant, api.webhooks.documents.get, identity, caller.tenant)
    if webhook is None:
        raise not_found("webhook", identity)
    return webhook


async def _webhook_objects(api: Api, caller: Caller, webhooks: list[WebhookDocument]) -> list[dict[str, Any]]:
    now, dropped = await api.quick.run(caller.tenant, lambda: (api.ledger.now(), api.webhooks.dropped(webhooks)))
    return [
        {
            "id": webhook.id,
            "object": "webhook",
            "url": webhook.url,
            "events": webhook.events,
            "created_at": int(webhook.created),
            "health": (state := webhook.health.state(now)),
            "reason": webhook.health.reason,
            "next_probe": webhook.health.until if state == "open" else None,
            "dropped": count,
        }
        for webhook, count in zip(webhooks, dropped, strict=True)
    ]


def _delivery_object(delivery: DeliveryDocument) -> dict[str, Any]:
    return {
        "id": delivery.id,
        "object": "webhook.delivery",
        "event": delivery.event,
        "event_id": delivery.event_id,
        "state": delivery.state,
        "attempts": delivery.attempts,
        "next_attempt": delivery.next,
    }
