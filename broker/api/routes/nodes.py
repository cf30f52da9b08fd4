"""Nodes: `/v1/nodes`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.dependencies import TheApi, TheCaller
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers
from perllm.broker.api.openapi.schemas import NodeList
from perllm.broker.ledger import Gone
from perllm.broker.messages import Counters, Heartbeat, NodeInfo

router = APIRouter(tags=["Nodes"])


@router.get("/v1/nodes", responses=answers(NodeList, examples.whole_list(examples.NODE)))
async def list_nodes(api: TheApi, caller: TheCaller) -> Response:
    """The live nodes and what their last heartbeats reported, then those that died without a word."""
    data: list[dict[str, Any]] = []

    def look() -> tuple[list[tuple[NodeInfo, Heartbeat | None, bool]], list[Gone], dict[str, str]]:
        nodes = api.ledger.nodes()
        dead = [gone for gone in api.ledger.gone() if not gone.left]
        return nodes, dead, api.ledger.distrusted([info.name for info, _, _ in nodes])

    live, dead, distrusted = await api.slow.run(caller.tenant, look)
    for info, beat, draining in (*live, *((gone.info, None, False) for gone in dead)):
        counters = beat.counters if beat else Counters()
        data.append(
            {
                "name": info.name,
                "tier": info.tier,
                "engine": info.engine,
                "slots": info.slots,
                "active": counters.active,
                "waiting": counters.waiting,
                "generated": counters.generated,
                "energy": {
                    "joules": counters.energy,
                    "method": info.power.method,
                    "estimated": info.power.estimated,
                },
                "draining": draining,
                "distrusted": distrusted.get(info.name),
                "state": "draining" if draining else "up" if len(data) < len(live) else "dead",
                "models": [offer.name for offer in info.models],
                "capabilities": {offer.name: sorted(offer.capabilities) for offer in info.models},
            }
        )
    return JSONResponse({"object": "list", "data": data})
