"""The shapes the OpenAPI document shows. Beside OpenAI's fields stand ours: see each one's description."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from perllm.broker.api.batches.store import Status
from perllm.broker.messages import (
    MAX_CHOICES,
    MAX_DIMENSIONS,
    MAX_INPUTS,
    MAX_TOOLS,
    RequestId,
    Sampling,
    State,
    Traceparent,
)
from perllm.broker.openai.requests import (
    ChatMessage,
    Deadline,
    ExpectedTokens,
    Metadata,
    ModelName,
    Service,
    TokenIds,
    Tokens,
    Value,
)


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


# --- requests: those of the OpenAI endpoints are the translation's (`perllm.broker.openai.requests`)


class TaskRequest(Sampling):
    """A task: exactly one of `prompt`, `prompt_ids` and `messages`, or of another `kind`, `inputs`. Its fields are
    `TaskSpec`'s, but for the key's tenant."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str | None, Field(min_length=1)] = None
    prompt_ids: TokenIds | None = None
    messages: list[ChatMessage] | None = None
    kind: Annotated[
        Literal["generate", "embed", "rerank"], Field(description="What is made of the input: text, vectors, scores.")
    ] = "generate"
    inputs: list[str] = Field(default_factory=list, max_length=MAX_INPUTS, description="What to embed, or to rank.")
    input_ids: list[TokenIds] = Field(default_factory=list, max_length=MAX_INPUTS, description="The same as token ids.")
    query: Annotated[str | None, Field(min_length=1, description="What to rank by.")] = None
    dimensions: Annotated[int | None, Field(ge=1, le=MAX_DIMENSIONS, description="Numbers of a vector.")] = None
    deadline: Deadline | None = None
    start_after: Annotated[float, Field(ge=0, description="Seconds from now before which it is not placed.")] = 0.0
    value: Value = 1.0
    max_tokens: Tokens | None = None
    fit_context: Annotated[
        bool, Field(description="An answer longer than context or deadline allow ends there; so where nothing is said.")
    ] = False
    model: ModelName | None = None
    service: Service = "default"
    expected_tokens: ExpectedTokens | None = None
    idempotency_key: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    stream: Annotated[
        bool, Field(description="Publish the text while it is generated: its response can be streamed.")
    ] = False
    metadata: Metadata = Field(default_factory=dict)
    stop: str | list[str] | None = None  # type: ignore[assignment]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    echo: bool = False
    suffix: Annotated[str | None, Field(min_length=1)] = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    allowed_tools: list[str] = Field(default_factory=list)
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    request_id: Annotated[RequestId | None, Field(description="Its name in logs; the request's, unless given.")] = None
    traceparent: Annotated[Traceparent | None, Field(description="Its trace; the header's, unless given.")] = None


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

    input_file_id: str = Field(description="a file of requests, one a line")
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank"] = (
        Field(description="of all its lines: chat completions, completions, responses, embeddings or rerank")
    )
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}[smhd]$")] = Field(
        description="any duration from `1s` to `30d`"
    )
    metadata: Metadata | None = Field(None, description="up to 16 pairs of text")
    output_expires_after: OutputExpiry | None = Field(
        None, description="how long the files that come of it are kept, from `created_at` on"
    )


EventName = Literal[
    "task.succeeded", "task.failed", "task.expired", "task.rejected", "task.cancelled",
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
    "response.completed", "response.failed", "response.cancelled", "response.incomplete",
]  # fmt: skip
EVENTS: tuple[EventName, ...] = get_args(EventName)
#: What a webhook is for that does not say: a response's events tell what its task's do.
USUAL_EVENTS = tuple(event for event in EVENTS if not event.startswith("response."))


class WebhookRequest(Shape):
    """A webhook: events of the tenant's tasks and batches are posted to `url`, signed as Standard Webhooks says."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(max_length=2048, pattern=r"^https?://")]
    events: Annotated[list[EventName], Field(min_length=1)] = list(USUAL_EVENTS)


# --- answers


class EnergyReceipt(Shape):
    """J by stage, how they were obtained, and whether that is an estimate; `total` is their sum."""

    transfer: float
    inference: float
    idle: float
    total: float
    method: str
    estimated: bool


class ReceiptFields(Shape):
    """Our part of every answer."""

    energy: EnergyReceipt | None
    node: str | None
    on_time: bool | None
    latency: Annotated[float | None, Field(description="s, from submission to the end")]


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class ChatChoice(Shape):
    index: int
    finish_reason: str | None
    message: dict[str, Any]
    logprobs: dict[str, Any] | None


class ChatCompletion(ReceiptFields):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Shape):
    index: int
    finish_reason: str | None
    text: str
    logprobs: dict[str, Any] | None


class Completion(ReceiptFields):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class EmbeddingsUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[
        list[float] | str, Field(description="base64 of little-endian 32-bit floats where that was asked for")
    ]


class Embeddings(ReceiptFields):
    id: str
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingsUsage


class Ranked(Shape):
    index: Annotated[int, Field(description="of the document, in the order they were given")]
    relevance_score: Annotated[float, Field(description="as the model gives it: compare within one answer")]
    document: dict[str, str] | None = None


class Reranking(ReceiptFields):
    id: str
    object: Literal["list"]
    model: str
    results: list[Ranked]
    usage: EmbeddingsUsage


class ResponseObject(ReceiptFields):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    model: str
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    previous_response_id: str | None
    reasoning: dict[str, Any]
    temperature: float
    top_logprobs: int
    top_p: float
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    truncation: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: dict[str, Any] | None


class Page(Shape):
    """What pages of lists have beside their `data`."""

    object: Literal["list"]
    has_more: bool
    first_id: str | None
    last_id: Annotated[str | None, Field(description="`after` for the next page")]


class InputItemPage(Page):
    data: list[dict[str, Any]]


class ModelObject(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: Annotated[int, Field(description="tokens, prompt and output together, of the node that takes most")]
    capabilities: Annotated[list[str], Field(description="what it can do on one of its nodes or another")]
    nodes: list[str]


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelObject]


class TaskObject(Shape):
    id: str
    object: Literal["task"]
    state: State
    submitted: Annotated[float, Field(description="s since the epoch")]
    deadline: Annotated[float, Field(description="s since the epoch")]
    node: str | None
    model: str | None
    attempt: int
    strikes: Annotated[int, Field(description="attempts that ended without a result")]
    service: str
    value: float
    metadata: dict[str, str]
    prompt: Annotated[str, Field(description="the start of it")]
    result: dict[str, Any] | None


class TaskPage(Page):
    data: list[TaskObject]


class SubmittedTask(Shape):
    id: str
    object: Literal["task"]
    state: Literal["pending"]
    repeated: Annotated[bool, Field(description="It was there before, under the same idempotency key.")]


class SubmittedTasks(Shape):
    object: Literal["list"]
    data: list[SubmittedTask]


class InfluenceObject(Shape):
    """Words of the prompt that make a longer answer likely (`factor` above 1) or a shorter one."""

    code: int
    factor: float
    words: str


class LengthObject(Shape):
    """The length of the answer, in tokens, that was believed: half are shorter than `median`, 90 % than `most`. It
    goes by the tenant's earlier tasks: those of the same class, with like text, or with this very prompt."""

    median: float
    most: float
    source: Literal["class", "text", "prompt"]
    because: list[InfluenceObject]


class ExplanationObject(Shape):
    """Why a task was placed or refused. The fields with a default are there once that is decided."""

    id: str
    object: Literal["explanation"]
    decided: bool
    policy: str | None = None
    action: Literal["dispatch", "reject", "expire"] | None = None
    sentence: str | None = None
    node: str | None = None
    candidates: list[dict[str, Any]] | None = None
    length: LengthObject | None = None


class NodeEnergy(Shape):
    """J since the node started, idle included, how they were obtained, and whether that is an estimate."""

    joules: float
    method: str
    estimated: bool


class NodeObject(Shape):
    name: str
    tier: Literal["edge", "cloud"]
    engine: str
    slots: Annotated[int, Field(description="tasks it runs at once")]
    active: int
    waiting: int
    generated: Annotated[int, Field(description="tokens since it started")]
    energy: NodeEnergy
    draining: bool
    state: Literal["up", "draining", "dead"]
    distrusted: Annotated[str | None, Field(description="why it is sent little: it took up nothing it was sent")]
    models: list[str]
    capabilities: Annotated[dict[str, list[str]], Field(description="what each of its models can do here")]


class NodeList(Shape):
    object: Literal["list"]
    data: list[NodeObject]


class FileObject(Shape):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FilePage(Page):
    data: list[FileObject]


class Deleted(Shape):
    id: str
    object: str
    deleted: bool


class RequestCounts(Shape):
    total: int
    completed: int
    failed: int


class BatchErrors(Shape):
    """The first of its bad lines; all are in the error file."""

    object: Literal["list"]
    data: list[dict[str, Any]]


class BatchObject(Shape):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchPage(Page):
    data: list[BatchObject]


class WebhookObject(Shape):
    id: str
    object: Literal["webhook"]
    url: str
    events: list[EventName]
    created_at: int
    health: Literal["closed", "open", "half-open", "disabled"]
    reason: str | None
    next_probe: Annotated[float | None, Field(description="s since the epoch")]
    dropped: int


class CreatedWebhook(WebhookObject):
    secret: Annotated[str, Field(description="Signs every delivery. It is in this answer and in no other.")]


class WebhookPage(Page):
    data: list[WebhookObject]


class DeliveryAttempt(Shape):
    at: Annotated[float, Field(description="s since the epoch")]
    status: int | None
    error: str | None
    took: Annotated[float, Field(description="s")]


class DeliveryObject(Shape):
    id: str
    object: Literal["webhook.delivery"]
    event: EventName
    event_id: str
    state: Literal["pending", "delivered", "failed"]
    attempts: list[DeliveryAttempt]
    next_attempt: Annotated[float | None, Field(description="s since the epoch")]


class DeliveryPage(Page):
    data: list[DeliveryObject]


class Health(Shape):
    status: str
