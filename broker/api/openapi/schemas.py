"""The shapes the OpenAPI document shows. Beside OpenAI's fields stand ours: see each one's description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from perllm.broker.messages import MAX_DEADLINE, Sampling, State


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow")


# --- errors


class ErrorBody(Shape):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorDocument(Shape):
    error: ErrorBody


# --- requests

Deadline = Annotated[
    Annotated[float, Field(gt=0, le=MAX_DEADLINE)] | str,
    Field(description="Ours: seconds from now, or a time (RFC 3339), by which the answer is needed.", examples=[30]),
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class _Asked(Sampling):
    """What every request may say."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[
        str | None, Field(description="A model on offer (`/v1/models`); `auto`, or none: any.", max_length=128)
    ] = None
    deadline: Deadline | None = None
    value: Annotated[float, Field(gt=0, le=1e6, description="Ours: the weight when not all can be on time.")] = 1.0
    service: Annotated[
        str, Field(max_length=128, description="Ours: the class whose lengths and rewards are learned together.")
    ] = "default"
    expected_tokens: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="Ours: a guess of the output's length.")
    ] = None
    metadata: Metadata = Field(default_factory=dict)


class TextPart(Shape):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]


class StreamOptions(Shape):
    include_usage: bool = False


class ChatRequest(_Asked):
    """A chat completion. Tools, audio and several choices are not supported and are refused by name."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    stop: str | list[str] | None = None  # type: ignore[assignment]
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: dict[str, Any] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None


class CompletionRequest(_Asked):
    """A completion. The prompt is one user turn of the model's chat template."""

    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None


class ResponseRequest(_Asked):
    """A response. With `background` the answer comes at once and the response is to be retrieved."""

    input: Annotated[str, Field(min_length=1)] | list[ChatMessage]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    previous_response_id: Annotated[str | None, Field(max_length=256)] = None
    background: bool = False
    stream: bool = False
    text: dict[str, Any] | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    user: str | None = None


class TaskRequest(_Asked):
    """A task: exactly one of `prompt` and `messages`."""

    prompt: Annotated[str | None, Field(min_length=1)] = None
    messages: list[ChatMessage] | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    idempotency_key: Annotated[str | None, Field(min_length=1, max_length=256)] = None


class TasksRequest(TaskRequest):
    """One task, or many as `tasks`: then nothing else, and either all are submitted or none."""

    tasks: Annotated[list[TaskRequest] | None, Field(min_length=1, max_length=1000)] = None


class OutputExpiry(Shape):
    """How long the output files are kept, s."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchRequest(Shape):
    """A batch. `completion_window` is any duration from seconds to 30 days: `90s`, `15m`, `24h`, `7d`."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}[smhd]$")]
    metadata: Metadata | None = None
    output_expires_after: OutputExpiry | None = None


EVENTS = (
    "task.succeeded", "task.failed", "task.expired", "task.rejected", "task.cancelled",
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
)  # fmt: skip
EventName = Literal[
    "task.succeeded", "task.failed", "task.expired", "task.rejected", "task.cancelled",
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
]  # fmt: skip


class WebhookRequest(Shape):
    """A webhook: events of the tenant's tasks and batches are posted to `url`, signed as Standard Webhooks says."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(max_length=2048, pattern=r"^https?://")]
    events: Annotated[list[EventName], Field(min_length=1)] = list(EVENTS)  # type: ignore[arg-type]


# --- answers


class EnergyReceipt(Shape):
    """J by stage, how they were obtained, and whether that is an estimate; `total` is their sum."""

    transfer: float
    inference: float
    idle: float
    total: float
    method: str
    estimated: bool


class Received(Shape):
    """Our part of every answer."""

    energy: EnergyReceipt | None = None
    node: str | None = None
    on_time: bool | None = None
    latency: Annotated[float | None, Field(description="s, from submission to the end")] = None


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(Shape):
    index: int
    finish_reason: str | None
    message: dict[str, Any] | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(Received):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Completion(Received):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ResponseObject(Received):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: dict[str, Any] | None


class ModelObject(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int
    nodes: list[str]


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelObject]


class TaskObject(Shape):
    id: str
    object: Literal["task"]
    state: State
    submitted: float
    deadline: float
    node: str | None
    model: str | None
    attempt: int
    result: dict[str, Any] | None


class TaskPage(Shape):
    object: Literal["list"]
    data: list[TaskObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class SubmittedTasks(Shape):
    object: Literal["list", "task"]


class ExplanationObject(Shape):
    id: str
    object: Literal["explanation"]
    decided: bool


class NodeObject(Shape):
    name: str
    tier: str
    engine: str
    slots: int
    active: int
    waiting: int
    draining: bool
    models: list[str]


class NodeList(Shape):
    object: Literal["list"]
    data: list[NodeObject]


class FileObject(Shape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str


class FilePage(Shape):
    object: Literal["list"]
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(Shape):
    id: str
    object: str
    deleted: bool


class BatchObject(Shape):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    created_at: int
    request_counts: dict[str, int]
    output_file_id: str | None
    error_file_id: str | None


class BatchPage(Shape):
    object: Literal["list"]
    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class WebhookObject(Shape):
    id: str
    object: Literal["webhook"]
    url: str
    events: list[str]
    created_at: int
    health: Literal["closed", "open", "half-open", "disabled"]
    reason: str | None
    next_probe: float | None
    dropped: int


class WebhookPage(Shape):
    object: Literal["list"]
    data: list[WebhookObject]
    has_more: bool


class DeliveryObject(Shape):
    id: str
    object: Literal["webhook.delivery"]
    event: str
    state: Literal["pending", "delivered", "failed"]
    attempts: list[dict[str, Any]]


class DeliveryPage(Shape):
    object: Literal["list"]
    data: list[DeliveryObject]
    has_more: bool


class Health(Shape):
    status: str
