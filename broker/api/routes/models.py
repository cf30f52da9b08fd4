"""Models: `/v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.callers import Caller
from perllm.broker.api.dependencies import TheApi, TheCaller
from perllm.broker.api.errors import not_found
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers
from perllm.broker.api.openapi.schemas import ModelList, ModelObject
from perllm.broker.api.state import Api

router = APIRouter(tags=["Models"])


@router.get("/v1/models", responses=answers(ModelList, examples.whole_list(examples.MODEL_OBJECT)))
async def list_models(api: TheApi, caller: TheCaller) -> Response:
    """The models live nodes offer."""
    return JSONResponse({"object": "list", "data": list((await _models(api, caller)).values())})


@router.get("/v1/models/{id:path}", responses=answers(ModelObject, examples.MODEL_OBJECT, 404))
async def get_model(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A model live nodes offer."""
    if (found := (await _models(api, caller)).get(id)) is None:
        raise not_found("model on any live node:", id)
    return JSONResponse(found)


async def _models(api: Api, caller: Caller) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for info, _, _ in await api.slow.run(caller.tenant, api.ledger.nodes):
        for offer in info.models:
            model = found.setdefault(
                offer.name,
                {
                    "id": offer.name,
                    "object": "model",
                    "created": 0,
                    "owned_by": "perllm",
                    "context": 0,
                    "capabilities": [],
                    "nodes": [],
                },
            )
            model["context"] = max(model["context"], offer.context)
            model["capabilities"] = sorted({*model["capabilities"], *offer.capabilities})
            model["nodes"].append(info.name)
    return found
