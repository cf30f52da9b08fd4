"""The native endpoints: `/v1/tasks`, `/v1/nodes`, `/v1/models`, and whether the door is open."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.errors import ApiError, not_found
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import (
    Deleted,
    ExplanationObject,
    Health,
    ModelList,
    ModelObject,
    NodeList,
    SubmittedTasks,
    TaskObject,
    TaskPage,
    TasksRequest,
)
from perllm.broker.api.paging import After, Limit, Order, page
from perllm.broker.api.requests import Api, Caller, Extensions, TheApi, TheCaller, read_json
from perllm.broker.errors import InvalidTask
from perllm.broker.ledger import TaskRecord
from perllm.broker.ledger.ledger import Glance
from perllm.broker.messages import Counters, State
from perllm.broker.openai.translation import messages

router = APIRouter(tags=["Tasks"])
catalogue = APIRouter(tags=["Models"])
health = APIRouter(tags=["Health"])

#: Most tasks of one request.
MANY = 1000
#: Tasks looked at for one page of a filtered list, and at once.
_LOOK_AT = 2000
_PIECE = 500
#: Bytes of tasks read for one page, about; what is longer comes on the next.
_PAGE_BYTES = 16 << 20


@router.post(
    "/v1/tasks",
    openapi_extra=takes_task(
        TasksRequest, one=examples.TASK_REQUEST, many={"tasks": [examples.TASK_REQUEST, {"prompt": "And the sea?"}]}
    ),
    responses=answers(SubmittedTasks, examples.SUBMITTED, 404, 408, 413, 422),
)
async def submit_tasks(request: Request, api: TheApi, caller: TheCaller, extensions: Extensions) -> Response:
    """Submit one task, or up to 1,000. If one of many is wrong, none is submitted."""
    body = await read_json(request)
    if "tasks" not in body:
        spec = await api.accept(caller, {**extensions, **_fields(body)})
        (accepted,) = await api.submit(caller, [spec])
        return JSONResponse({"id": accepted.id, "object": "task", "state": "pending", "repeated": accepted.repeated})
    many = body["tasks"]
    if len(body) > 1:
        other = next(name for name in body if name != "tasks")
        raise ApiError(400, f"{other}: not a field beside 'tasks'; put it into each task", param=other)
    if not isinstance(many, list) or not 1 <= len(many) <= MANY:
        raise ApiError(400, f"tasks: a list of 1 to {MANY} tasks is required", param="tasks")
    extensions.pop("idempotency_key", None)  # one key cannot stand for many tasks
    specs = []
    for number, fields in enumerate(many):
        try:
            if not isinstance(fields, dict):
                raise InvalidTask("task: an object is required")
            specs.append(await api.accept(caller, {**extensions, **_fields(fields)}))
        except InvalidTask as error:
            raise type(error)(f"tasks.{number}.{error}") from None
        except ApiError as error:
            raise ApiError(error.status_code, f"tasks.{number}: {error.detail}", param=f"tasks.{number}") from None
    accepted_all = await api.submit(caller, specs)
    data = [{"id": a.id, "object": "task", "state": "pending", "repeated": a.repeated} for a in accepted_all]
    return JSONResponse({"object": "list", "data": data})


def _fields(body: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in body.items() if value is not None}
    if "tenant" in fields:
        raise InvalidTask("tenant: it is the key's; not a field of this request")
    if fields.get("model") == "auto":
        del fields["model"]
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if "messages" in fields:
        fields["messages"] = messages(fields["messages"])
    return fields


@router.get("/v1/tasks", responses=answers(TaskPage, examples.page(examples.TASK)))
async def list_tasks(
    api: TheApi,
    caller: TheCaller,
    state: Annotated[State | None, Query(description="Only tasks in this state.")] = None,
    service: Annotated[str | None, Query(max_length=128, description="Only tasks of this class.")] = None,
    model: Annotated[str | None, Query(max_length=128, description="Only tasks that ask for this model.")] = None,
    limit: Limit = 20,
    after: After = None,
    order: Order = "desc",
) -> Response:
    """The tenant's tasks, whichever door they came by, by the time of their submission. A page may have fewer than
    `limit`, of a filtered list none: go on after its `last_id` while there is more."""

    def look() -> tuple[list[TaskRecord], str | None, bool]:
        wanted: list[str] = []
        last, seen, size, more = after, 0, 0, True
        full = False
        while more and not full and seen < _LOOK_AT:
            ids = api.ledger.tasks_of(caller.tenant, after=last, limit=_PIECE, newest=order == "desc")
            more = len(ids) == _PIECE
            for task_id, glance in zip(ids, api.ledger.glances(ids), strict=True):
                if glance is not None and _wanted(glance, state, service, model):
                    full = len(wanted) == limit or (bool(wanted) and size + glance.size > _PAGE_BYTES)
                    if full:
                        break
                    wanted.append(task_id)
                    size += glance.size
                last = task_id
            seen += len(ids)
        return api.ledger.legible(wanted), last, more or full

    found, last, more = await api.slow.run(caller.tenant, look)
    data = [_shown(record, whole=False) for record in found]
    return JSONResponse(page(data, more, last))


def _wanted(task: Glance, state: State | None, service: str | None, model: str | None) -> bool:
    return state in (None, task.state) and service in (None, task.service) and model in (None, task.model)


@router.get("/v1/tasks/{id}", responses=answers(TaskObject, examples.TASK, 404))
async def get_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A task as it is now, with its result once it has one."""
    return JSONResponse(_shown(await api.record(caller, id), whole=True))


@router.post("/v1/tasks/{id}/cancel", responses=answers(TaskObject, examples.TASK, 404))
async def cancel_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Cancel a task, a running one too. One that has ended stays as it is."""
    await api.record(caller, id)
    await api.client.cancel(id)
    return JSONResponse(_shown(await api.record(caller, id), whole=True))


@router.delete(
    "/v1/tasks/{id}", responses=answers(Deleted, {**examples.DELETED, "id": "task-1", "object": "task"}, 404)
)
async def delete_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Forget a task, its prompt, text and result, for good. One that goes on is cancelled first."""
    await api.record(caller, id)
    await api.quick.run(caller.tenant, api.ledger.forget, id)
    return JSONResponse({"id": id, "object": "task", "deleted": True})


@router.get("/v1/tasks/{id}/explain", responses=answers(ExplanationObject, examples.EXPLANATION, 404))
async def explain_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Why a task was placed where it was, or refused."""
    record = await api.record(caller, id)
    why = record.why.model_dump(mode="json") if record.why else {}
    return JSONResponse({"id": id, "object": "explanation", "decided": record.why is not None, **why})


def _shown(record: TaskRecord, *, whole: bool) -> dict[str, Any]:
    spec, result = record.spec, record.result
    return {
        "id": record.id,
        "object": "task",
        "state": str(record.state),
        "submitted": record.submitted,
        "deadline": record.deadline,
        "node": record.node or (result.receipt.node if result and result.receipt else None),
        "model": record.model or spec.model,
        "attempt": record.attempt,
        "strikes": record.strikes,
        "service": spec.service,
        "value": spec.value,
        "metadata": dict(spec.metadata),
        "prompt": spec.preview(200),
        "result": result.model_dump(mode="json", exclude=None if whole else {"output"}) if result else None,
    }


# --- what there is


@router.get("/v1/nodes", responses=answers(NodeList, examples.page(examples.NODE)))
async def list_nodes(api: TheApi, caller: TheCaller) -> Response:
    """The live nodes and what they last said of themselves."""
    data = []
    for info, beat, draining in await api.slow.run(caller.tenant, api.ledger.nodes):
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
                "models": [offer.name for offer in info.models],
            }
        )
    return JSONResponse({"object": "list", "data": data})


@catalogue.get("/v1/models", responses=answers(ModelList, examples.page(examples.MODEL_OBJECT)))
async def list_models(api: TheApi, caller: TheCaller) -> Response:
    """The models live nodes offer."""
    return JSONResponse({"object": "list", "data": list((await _models(api, caller)).values())})


@catalogue.get("/v1/models/{id:path}", responses=answers(ModelObject, examples.MODEL_OBJECT, 404))
async def get_model(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A model live nodes offer."""
    if (found := (await _models(api, caller)).get(id)) is None:
        raise not_found("model on any live node:", id)
    return JSONResponse(found)


async def _models(api: Api, caller: Caller) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for info, _, _ in await api.slow.run(caller.tenant, api.ledger.nodes):
        for offer in info.models:
            shown = found.setdefault(
                offer.name,
                {"id": offer.name, "object": "model", "created": 0, "owned_by": "perllm", "context": 0, "nodes": []},
            )
            shown["context"] = max(shown["context"], offer.context)
            shown["nodes"].append(info.name)
    return found


# --- health


def _says(status: str) -> dict[str, Any]:
    content = {"application/json": {"example": {"status": status}}}
    return {"model": Health, "description": status.capitalize() + ".", "content": content}


@health.get("/health", responses={200: _says("ok")})
async def alive() -> Response:
    """Whether this process answers. Needs no key."""
    return JSONResponse({"status": "ok"})


@health.get("/ready", responses={200: _says("ready"), 503: _says("no scheduler and no node")})
async def ready(api: TheApi) -> Response:
    """Whether tasks can be taken and done: the ledger answers, a scheduler leads, a node is live. Needs no key."""
    lacking = await api.readiness()
    if lacking:
        return JSONResponse({"status": f"no {' and no '.join(lacking)}"}, 503)
    return JSONResponse({"status": "ready"})
