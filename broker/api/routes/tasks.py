"""Tasks: `/v1/tasks`, PerLLM's own way in."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from perllm.broker.api.dependencies import TheApi, TheCaller, header_fields
from perllm.broker.api.errors import ApiError
from perllm.broker.api.openapi import examples
from perllm.broker.api.openapi.document import answers, takes_task
from perllm.broker.api.openapi.schemas import (
    Deleted,
    ExplanationObject,
    SubmittedTask,
    SubmittedTasks,
    TaskObject,
    TaskPage,
    TasksRequest,
)
from perllm.broker.api.paging import After, Limit, Order, page
from perllm.broker.api.request_body import read_json
from perllm.broker.api.submission import Accepted
from perllm.broker.errors import InvalidTask
from perllm.broker.ledger import Glance, TaskRecord
from perllm.broker.messages import State
from perllm.broker.openai import tools
from perllm.broker.openai.turns import turns

router = APIRouter(tags=["Tasks"])

#: Most tasks of one request.
MAX_TASKS = 1000
#: Most tasks read for one page of a filtered list, and those read at once.
_MAX_READ, _READ = 2000, 500
#: Bytes of tasks read for one page, about; what is longer comes on the next.
_PAGE_BYTES = 16 << 20


@router.post(
    "/v1/tasks",
    openapi_extra=takes_task(
        TasksRequest, one=examples.TASK_REQUEST, many={"tasks": [examples.TASK_REQUEST, {"prompt": "And the sea?"}]}
    ),
    responses=answers(SubmittedTask | SubmittedTasks, examples.SUBMITTED, 404, 408, 413, 422),
)
async def submit_tasks(request: Request, api: TheApi, caller: TheCaller) -> Response:
    """Submit one task, or up to 1,000. If one of many is wrong, none is submitted."""
    headers = header_fields(request)
    body = await read_json(request)
    if "tasks" not in body:
        spec = await api.tasks.accept(caller, {**headers, **_task_fields(body)})
        (accepted,) = await api.tasks.submit(caller, [spec])
        return JSONResponse(_submitted_task(accepted))
    many = body["tasks"]
    if len(body) > 1:
        other = next(name for name in body if name != "tasks")
        raise ApiError(400, f"{other}: not a field beside 'tasks'; put it into each task", param=other)
    if not isinstance(many, list) or not 1 <= len(many) <= MAX_TASKS:
        raise ApiError(400, f"tasks: a list of 1 to {MAX_TASKS} tasks is required", param="tasks")
    headers.pop("idempotency_key", None)  # one key cannot stand for many tasks
    specs = []
    for number, fields in enumerate(many):
        try:
            if not isinstance(fields, dict):
                raise InvalidTask("task: an object is required")
            specs.append(await api.tasks.accept(caller, {**headers, **_task_fields(fields)}))
        except InvalidTask as error:
            raise type(error)(f"tasks.{number}.{error}") from None
        except ApiError as error:
            raise ApiError(error.status_code, f"tasks.{number}: {error.detail}", param=f"tasks.{number}") from None
    accepted_all = await api.tasks.submit(caller, specs)
    return JSONResponse({"object": "list", "data": [_submitted_task(accepted) for accepted in accepted_all]})


def _submitted_task(accepted: Accepted) -> dict[str, Any]:
    return {"id": accepted.id, "object": "task", "state": "pending", "repeated": accepted.repeated}


def _task_fields(body: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in body.items() if value is not None}
    if "tenant" in fields:
        raise InvalidTask("tenant: it is the key's; not a field of this request")
    if "request" in fields:
        raise InvalidTask("request: not a field of this request")
    if fields.get("model") == "auto":
        del fields["model"]
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if "messages" in fields:
        fields["messages"] = turns(fields["messages"])
    if "tools" in fields:
        fields["tools"] = tools.tools(fields["tools"])
    if isinstance(fields.get("tool_choice"), dict):
        fields.update(tools.choice(fields["tool_choice"], fields.get("tools", [])))
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
    """The tenant's tasks, however they were submitted, by the time of their submission. A page may have fewer than
    `limit`, of a filtered list none: go on after its `last_id` while there is more."""

    def read() -> tuple[list[TaskRecord], str | None, bool]:
        wanted: list[str] = []
        last, seen, size, more = after, 0, 0, True
        full = False
        while more and not full and seen < _MAX_READ:
            ids = api.ledger.tasks_of(caller.tenant, after=last, limit=_READ, newest=order == "desc")
            more = len(ids) == _READ
            for task_id, glance in zip(ids, api.ledger.glances(ids), strict=True):
                if glance is not None and _matches(glance, state, service, model):
                    full = len(wanted) == limit or (bool(wanted) and size + glance.size > _PAGE_BYTES)
                    if full:
                        break
                    wanted.append(task_id)
                    size += glance.size
                last = task_id
            seen += len(ids)
        return api.ledger.legible(wanted), last, more or full

    found, last, more = await api.slow.run(caller.tenant, read)
    data = [_task_object(record, whole=False) for record in found]
    return JSONResponse(page(data, more, last))


def _matches(task: Glance, state: State | None, service: str | None, model: str | None) -> bool:
    return state in (None, task.state) and service in (None, task.service) and model in (None, task.model)


@router.get("/v1/tasks/{id}", responses=answers(TaskObject, examples.TASK, 404))
async def get_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """A task as it is now, with its result once it has one."""
    return JSONResponse(_task_object(await api.tasks.record(caller, id), whole=True))


@router.post("/v1/tasks/{id}/cancel", responses=answers(TaskObject, examples.TASK, 404))
async def cancel_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Cancel a task, a running one too. One that has ended stays as it is."""
    return JSONResponse(_task_object(await api.tasks.cancel(caller, id), whole=True))


@router.delete(
    "/v1/tasks/{id}", responses=answers(Deleted, {**examples.DELETED, "id": "task-1", "object": "task"}, 404)
)
async def delete_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Forget a task, its prompt, text and result, for good. One that goes on is cancelled first."""
    await api.tasks.forget(caller, id)
    return JSONResponse({"id": id, "object": "task", "deleted": True})


@router.get("/v1/tasks/{id}/explain", responses=answers(ExplanationObject, examples.EXPLANATION, 404))
async def explain_task(id: str, api: TheApi, caller: TheCaller) -> Response:
    """Why a task was placed where it was, or refused."""
    record = await api.tasks.record(caller, id)
    why = record.why.model_dump(mode="json") if record.why else {}
    return JSONResponse({"id": id, "object": "explanation", "decided": record.why is not None, **why})


def _task_object(record: TaskRecord, *, whole: bool) -> dict[str, Any]:
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
