"""`/health` and `/ready`, for load balancers and supervisors: neither needs a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.dependencies import TheApi
from perllm.broker.api.openapi.schemas import Health

router = APIRouter(tags=["Health"])


def _answer(status: str) -> dict[str, Any]:
    content = {"application/json": {"example": {"status": status}}}
    return {"model": Health, "description": status.capitalize() + ".", "content": content}


@router.get("/health", responses={200: _answer("ok")})
async def alive() -> Response:
    """Whether this process answers. Needs no key."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", responses={200: _answer("ready"), 503: _answer("no scheduler and no node")})
async def ready(api: TheApi) -> Response:
    """Whether tasks can be taken and done: the ledger answers, a scheduler leads, a node is live, and this process is
    not about to stop. Needs no key."""
    if api.stopping.begun:
        return JSONResponse({"status": "stopping"}, 503)
    missing = await api.readiness()
    if missing:
        return JSONResponse({"status": f"no {' and no '.join(missing)}"}, 503)
    return JSONResponse({"status": "ready"})
