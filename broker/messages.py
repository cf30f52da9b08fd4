"""The wire contract: every shape that travels between producers, ledger, scheduler and workers.

Models a user fills in (`TaskSpec`) forbid unknown fields, so a typo is an error at once. Models one part of the
system sends to another ignore unknown fields, so a newer sender and an older reader get along. A field may be added;
the meaning of one never changes. A change that breaks this bumps `WIRE_VERSION`.

Units everywhere: seconds (s), joules (J), watts (W), tokens, bytes. Absolute times are the Redis server's clock,
seconds since the epoch; durations are measured on one machine with its monotonic clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypedDict, cast
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator, model_validator

from perllm.broker.capabilities import BEFORE_CAPABILITIES, OF_KIND, Capability, lacking
from perllm.broker.traceparent import trace_id
from perllm.broker.vectors import BYTES_PER_NUMBER, unpack

WIRE_VERSION = 1

#: The deadline where none is given, and the longest that is accepted, seconds (30 days).
DEADLINE = 60.0
MAX_DEADLINE = 30 * 86_400.0
#: Longest name of a node, model, service class or tenant, characters.
MAX_NAME = 128
#: Highest value of a task.
MAX_VALUE = 1e6
#: Most chat turns in a task, and longest grammar or JSON schema, bytes.
MAX_MESSAGES = 4096
MAX_SCHEMA = 65_536
#: Most tools of a task, and bytes of all of them together as JSON.
MAX_TOOLS, MAX_TOOLS_BYTES = 128, 262_144
#: Most answers to one prompt, and most inputs of one embedding or rerank task.
MAX_CHOICES = 16
#: Most log-probabilities at one position of all answers to a prompt together.
MAX_LOGPROBS = 64
MAX_INPUTS = 2048
#: Most numbers of an embedding, and so many where it is not known.
MAX_DIMENSIONS, USUAL_DIMENSIONS = 65_536, 1024
#: Deepest nesting of JSON that comes from outside, levels: below what any of our readers can take (pydantic's: 199),
#: so that whatever is accepted can be read again, also where it is part of something larger.
MAX_DEPTH = 64
#: Bytes of prompt per token assumed before a tokenizer has seen the prompt.
BYTES_PER_TOKEN = 4

#: A name for a request, and a trace's context (w3.org/TR/trace-context), as they stand in logs.
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/+=@-]{1,128}$")]
Traceparent = Annotated[str, Field(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")]
Name = Annotated[str, Field(max_length=MAX_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$")]
NodeName = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**32)]


def check_depth(value: Any) -> None:
    """Raises ValueError where lists and objects are nested deeper than MAX_DEPTH. Level by level, not by recursion, so
    that no depth, and no object within itself, is too much for it."""
    level = {id(value): value}  # what is in several places is looked at once
    for _ in range(MAX_DEPTH):
        inner: dict[int, Any] = {}
        for each in level.values():
            if isinstance(each, dict):
                inner.update((id(v), v) for v in each.values() if isinstance(v, dict | list | tuple))
            elif isinstance(each, list | tuple):
                inner.update((id(v), v) for v in each if isinstance(v, dict | list | tuple))
        if not inner:
            return
        level = inner
    raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")


def checked_json(value: dict[str, Any], most: int) -> dict[str, Any]:
    """An object as it will be read again once it is written: tuples are lists, keys text. Raises ValueError for one
    that is nested too deep, is no JSON, or takes more than `most` bytes."""
    check_depth(value)
    try:
        written = json.dumps(value, allow_nan=False, ensure_ascii=False)
        size = len(written.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if size > most:
        raise ValueError(f"{size} bytes; the limit is {most} bytes")
    return cast("dict[str, Any]", json.loads(written))


def whole_text(text: str) -> str:
    """The text with halves of surrogate pairs joined or, alone, replaced by U+FFFD: only so can it be written as UTF-8.
    Engines that speak JSON, and argument lists, may contain them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class State(StrEnum):
    """Where a task is. The last five are final and never change."""

    PENDING = "pending"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"
    REJECTED = "rejected"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self not in (State.PENDING, State.DISPATCHED, State.RUNNING)


class StrictModel(BaseModel):
    """A model users fill in: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class TolerantModel(BaseModel):
    """A model one part of the system sends another: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


# --- what a producer submits


#: Any bound has pydantic see to it that the text can be written.
Text = Annotated[str, Field(min_length=0)]
ToolName = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_.:/-]+$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1)]


class Tool(StrictModel):
    """A function the model may call. `parameters` is the JSON schema of its arguments, an object; None: it takes none.
    With `strict` what the model writes is held to that schema."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @field_validator("parameters")
    @classmethod
    def _is_an_objects_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is None:
            return None
        schema = checked_json(schema, MAX_SCHEMA)
        kind = schema.get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            raise ValueError(f"arguments are always an object: its 'type' is {json.dumps(kind)[:40]}, not \"object\"")
        return schema


class ToolCall(TolerantModel):
    """A call of a tool: by the model, or in an assistant's turn. `arguments` is JSON as the model wrote it."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    name: ToolName
    arguments: Text = "{}"


class Message(StrictModel):
    """One chat turn. An assistant's may be calls of tools, with or without text; each of them is answered by a turn of
    the role `tool` with its id. `reasoning` is what an assistant thought before it said this."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    reasoning: Text | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Field(max_length=MAX_TOOLS)] = ()
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        if (self.tool_calls or self.reasoning is not None) and self.role != "assistant":
            raise ValueError("only an assistant's turn may have 'tool_calls' or 'reasoning'")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("only a tool's turn may have a 'tool_call_id'")
        if self.content is None and not self.tool_calls:
            raise ValueError("give a 'content'")
        return self

    def size(self) -> int:
        """Bytes of text in it."""
        calls = (text for call in self.tool_calls for text in (call.name, call.arguments))
        return sum(len(text.encode(errors="replace")) for text in (self.content, self.reasoning, *calls) if text)


class Sampling(StrictModel):
    """How tokens are drawn: the OpenAI API's names and ranges, plus `top_k`, `min_p`, `repeat_penalty`, `grammar`."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repeat_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field((), max_length=16)
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    json_schema: dict[str, Any] | None = None
    grammar: Annotated[str, Field(max_length=MAX_SCHEMA)] | None = None
    #: Added to the logits of these tokens before one is drawn.
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = Field(
        default_factory=dict
    )

    @field_validator("json_schema")
    @classmethod
    def _is_json(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if schema is None else checked_json(schema, MAX_SCHEMA)


class TaskSpec(Sampling):
    """One LLM task as its producer states it.

    `kind` says what is made of the input. `generate`: text, of exactly one of `prompt`, `prompt_ids` (its
    token ids) and `messages`. `embed`: a vector for each of `inputs` or `input_ids`. `rerank`: for each of `inputs`,
    how well it answers `query`.

    `deadline` is in seconds from the moment the ledger accepts the task. `value` weighs the task against others when
    not all can be on time. `service` is the class whose lengths and rewards are learned together. `expected_tokens`
    is the producer's guess of the output length, used as evidence, not as a limit. `stream` asks the worker to publish
    the answer as it is generated (`AsyncClient.stream`).

    It is not placed before `start_after` seconds have passed from that moment.
    An answer has at most `max_tokens`. With `fit_context` one that is longer than the context has room for, or the time
    to the deadline, ends there (`length`), where it is refused, or expires, without: so it is for a task whose producer
    did not say `max_tokens` (`TaskValidator`).

    `n` answers are made of one prompt. `tools` may be called if `tool_choice` is `auto`, and must be if it is
    `required`; only the `allowed_tools` if some are named. `echo` has the text begin with the prompt; `suffix` is what
    comes after the text that is asked for. `request` is what the HTTP API's answer repeats of its request, and means
    nothing to the task. `request_id` and the trace in `traceparent` stand in the lines logged of the task.
    """

    kind: Literal["generate", "embed", "rerank"] = "generate"
    prompt: Annotated[str, Field(min_length=1)] | None = None
    prompt_ids: TokenIds | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    deadline: Annotated[float, Field(gt=0, le=MAX_DEADLINE)] = DEADLINE
    value: Annotated[float, Field(gt=0, le=MAX_VALUE, allow_inf_nan=False)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    fit_context: bool = False
    model: Name | None = None
    service: Name = "default"
    tenant: Name = "default"
    expected_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    stream: bool = False
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    echo: bool = False
    suffix: Annotated[str, Field(min_length=1)] | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS)] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    allowed_tools: Annotated[tuple[ToolName, ...], Field(max_length=MAX_TOOLS)] = ()
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: Annotated[dict[Annotated[str, Field(max_length=64)], Any], Field(max_length=16)] = Field(
        default_factory=dict
    )
    inputs: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MAX_INPUTS)] = ()
    input_ids: Annotated[tuple[TokenIds, ...], Field(max_length=MAX_INPUTS)] = ()
    query: Annotated[str, Field(min_length=1)] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    start_after: Annotated[float, Field(ge=0, lt=MAX_DEADLINE)] = 0.0
    request: Annotated[dict[Annotated[str, Field(max_length=64)], Any], Field(max_length=16)] = Field(
        default_factory=dict
    )
    request_id: RequestId | None = None
    traceparent: Traceparent | None = None

    @field_validator("chat_template_kwargs", "request")
    @classmethod
    def _small_json(cls, given: dict[str, Any]) -> dict[str, Any]:
        return checked_json(given, MAX_SCHEMA)

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if self.kind == "generate":
            if [self.prompt, self.prompt_ids, self.messages].count(None) != 2:
                raise ValueError("give exactly one of 'prompt', 'prompt_ids' and 'messages'")
            foreign = bool(self.inputs or self.input_ids) or self.query is not None or self.dimensions is not None
        else:
            if bool(self.inputs) == bool(self.input_ids) or (self.kind == "rerank" and self.input_ids):
                raise ValueError(f"give 'inputs': what to {self.kind}")
            ours = (self.prompt, self.prompt_ids, self.messages, self.tools, self.json_schema, self.grammar)
            foreign = any(each is not None and each != () for each in ours) or self.n > 1
            if self.kind == "rerank" and self.dimensions is not None:
                raise ValueError("'dimensions' is for embed")
            if (self.query is None) == (self.kind == "rerank"):
                raise ValueError("give a 'query' to rerank by" if self.kind == "rerank" else "'query' is for rerank")
        if foreign:
            raise ValueError(f"a field of another kind of task is given; this one's is {self.kind!r}")
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("give at most one of 'json_schema' and 'grammar'")
        if self.start_after >= self.deadline:
            both = f"start_after, {self.start_after:g} s, is not before its deadline, {self.deadline:g} s"
            raise ValueError(f"{both}: both count from the submission")
        return self

    @model_validator(mode="after")
    def _known_tools(self) -> Self:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("'tools' has two of one name")
        if unknown := set(self.allowed_tools) - set(names):
            raise ValueError(f"'tools' has none named {min(unknown)!r}")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("'tool_choice' is 'required': give 'tools'")
        if sum(len(tool.model_dump_json()) for tool in self.tools) > MAX_TOOLS_BYTES:
            raise ValueError(f"'tools' take more than {MAX_TOOLS_BYTES} bytes")
        if self.logprobs is not None and self.n * (self.logprobs + 1) > MAX_LOGPROBS:
            raise ValueError(f"'n' times 'logprobs' + 1 is above {MAX_LOGPROBS}: lower one of them")
        if self.suffix is not None and self.prompt is None:
            raise ValueError("'suffix' needs a 'prompt'")
        if self.echo and self.prompt is None and self.prompt_ids is None:
            raise ValueError("'echo' needs a 'prompt' or 'prompt_ids'")
        return self

    def origin(self) -> dict[str, str]:
        """What lines of a log say of where it comes from, as far as it is known: `request_id`, `trace_id`."""
        known = {} if self.request_id is None else {"request_id": self.request_id}
        return known if self.traceparent is None else known | {"trace_id": trace_id(self.traceparent)}

    @property
    def offered_tools(self) -> tuple[Tool, ...]:
        """The tools the model may call."""
        if self.tool_choice == "none":
            return ()
        return tuple(t for t in self.tools if not self.allowed_tools or t.name in self.allowed_tools)

    def needs(self) -> tuple[Capability, ...]:
        """What a model must be able to do to serve this, sorted."""
        match self.kind:
            case "embed" | "rerank":
                wanted = {OF_KIND[self.kind]: True}
            case "generate":
                wanted = {
                    Capability.GENERATE: True,
                    Capability.CHAT: self.messages is not None,
                    Capability.TOOLS: bool(self.offered_tools),
                    Capability.REASONING: self.reasoning_effort not in (None, "none"),
                    Capability.LOGPROBS: self.logprobs is not None,
                    Capability.LOGIT_BIAS: bool(self.logit_bias),
                    Capability.GRAMMAR: self.grammar is not None,
                    Capability.JSON_SCHEMA: self.json_schema is not None,
                    Capability.CHOICES: self.n > 1,
                    Capability.INFILL: self.suffix is not None,
                }
        wanted[Capability.TOKENS] = bool(self.prompt_ids or self.input_ids)
        return tuple(sorted(capability for capability, is_needed in wanted.items() if is_needed))

    def texts(self) -> list[str]:
        """The input's texts, in order: a chat's turns, or what is to be embedded; of token ids, their numbers."""
        if self.messages is not None:
            return [message.content or "" for message in self.messages]
        ids = (self.prompt_ids, *self.input_ids)
        numbers = (" ".join(map(str, each)) for each in ids if each is not None)
        return [*(text for text in (self.prompt, self.query, *self.inputs) if text is not None), *numbers]

    def text_bytes(self) -> int:
        """Size of the input text, bytes; of token ids, as many as their text would have about."""
        if self.messages is not None:
            texts = sum(message.size() for message in self.messages)
            return texts + sum(len(tool.model_dump_json()) for tool in self.tools)
        texts = sum(len(t.encode(errors="replace")) for t in (self.prompt, self.suffix, self.query, *self.inputs) if t)
        return texts + BYTES_PER_TOKEN * sum(map(len, (self.prompt_ids or (), *self.input_ids)))

    def estimated_tokens(self) -> int:
        """Tokens of the input, about; a query is read anew beside each of what is ranked by it."""
        again = len((self.query or "").encode(errors="replace")) * max(0, len(self.inputs) - 1)
        return (self.text_bytes() + again) // BYTES_PER_TOKEN + 1

    def embeddings_bytes(self) -> int:
        """Bytes its embeddings will take as they are stored, about; of another task nothing."""
        if self.kind != "embed":
            return 0
        numbers = (len(self.inputs) + len(self.input_ids)) * (self.dimensions or USUAL_DIMENSIONS)
        return round(numbers * BYTES_PER_NUMBER)

    def preview(self, width: int = 60) -> str:
        """The start of the input on one line, for people."""
        match self.kind:
            case "generate":
                text = self.texts()[-1]
            case "embed":
                text = self.inputs[0] if self.inputs else " ".join(map(str, self.input_ids[0][:width]))
            case "rerank":
                text = self.query or ""
        line = " ".join(text[: width * 4].split())
        return line if len(line) <= width else line[: width - 1] + "…"


class TaskFields(TypedDict, total=False):
    """`TaskSpec`'s optional fields as keyword arguments, for the producers' methods."""

    messages: Sequence[Mapping[str, Any] | Message]
    deadline: float
    value: float
    max_tokens: int
    fit_context: bool
    model: str
    service: str
    tenant: str
    expected_tokens: int
    idempotency_key: str
    stream: bool
    metadata: Mapping[str, str]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repeat_penalty: float
    seed: int
    stop: Sequence[str]
    logprobs: int
    json_schema: Mapping[str, Any]
    grammar: str
    logit_bias: Mapping[int, float]
    n: int
    echo: bool
    suffix: str
    tools: Sequence[Mapping[str, Any] | Tool]
    tool_choice: Literal["auto", "none", "required"]
    allowed_tools: Sequence[str]
    parallel_tool_calls: bool
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"]
    chat_template_kwargs: Mapping[str, Any]
    kind: Literal["generate", "embed", "rerank"]
    prompt_ids: Sequence[int]
    inputs: Sequence[str]
    input_ids: Sequence[Sequence[int]]
    query: str
    dimensions: int
    start_after: float
    request_id: str
    traceparent: str


def new_id() -> str:
    """A fresh task id (a random UUID, as Celery's own)."""
    return str(uuid4())


# --- what a worker reports


class Energy(TolerantModel):
    """Joules one task cost, by stage, and how they were obtained.

    `inference` excludes the node's idle power, which is kept apart in `idle` (the task's share of it while it ran).
    `method` is `nvml`, `rapl`, `cpu-model`, `remote-price` or `emulated`; `estimated` is False only for a counter's
    reading.
    """

    transfer: NonNegative = 0.0
    inference: NonNegative = 0.0
    idle: NonNegative = 0.0
    method: str
    estimated: bool

    @property
    def total(self) -> float:
        return self.transfer + self.inference + self.idle


class StepTotals(TolerantModel):
    """One model's part of its engine's running totals."""

    steps: int = 0
    busy: NonNegative = 0.0  # s
    prefilled: int = 0  # tokens
    sequence_steps: int = 0
    context_steps: int = 0


class Counters(TolerantModel):
    """An engine's running totals since it started, and its present state.

    One engine step costs about a + b·active + c·prefilled + d·context seconds (docs/architecture.md, "The step cost");
    the totals let the scheduler fit that from the difference of two readings.
    """

    steps: int = 0
    busy: NonNegative = 0.0  # s spent inside engine steps
    generated: int = 0  # tokens
    prefilled: int = 0  # tokens
    sequence_steps: int = 0  # Σ over steps of active sequences
    context_steps: int = 0  # Σ over steps of context tokens held, tokens
    active: int = 0  # sequences now in the batch
    waiting: int = 0  # requests accepted, not yet in the batch
    free_kv: int = 0  # tokens
    since_progress: NonNegative = 0.0  # s since a step last ended while there was work; 0 when idle
    longest_step: NonNegative = 0.0  # s, over the last minute
    energy: NonNegative = 0.0  # J, the node's meter since start
    models: dict[str, StepTotals] = Field(default_factory=dict)  # by name, of an engine that serves several


class Receipt(TolerantModel):
    """What one finished attempt took, as the worker measured it.

    `before` and `after` are the engine's counters when the attempt entered and left it. `transfer` is the time the
    claim took to bring `payload_bytes` over the link.
    """

    node: str
    model: str
    attempt: int
    payload_bytes: int = 0
    transfer: NonNegative = 0.0  # s
    wait: NonNegative = 0.0  # s inside the worker before the first prefill step
    prefill: NonNegative = 0.0  # s
    decode: NonNegative = 0.0  # s
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of prompt_tokens, not prefilled because a shared prefix was there
    completion_tokens: int = 0  # of all choices
    choice_tokens: tuple[int, ...] = ()  # of each, where there are several
    reasoning_tokens: int = 0  # of completion_tokens
    cut: bool = False  # an answer ended at a limit and would have gone on
    energy: Energy
    before: Counters = Counters()
    after: Counters = Counters()
    stalled: bool = False  # a stall overlapped the attempt: useless for learning speed


class Choice(TolerantModel):
    """One answer an engine produced. `reasoning` is what the model thought before; None: it does not think apart.
    `tokens` counts all of it."""

    text: str
    finish_reason: Literal["stop", "length", "tool_calls", "deadline", "cancelled"]
    logprobs: list[dict[str, Any]] | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tokens: int = 0

    @field_validator("text", "reasoning", mode="before")
    @classmethod
    def _whole(cls, text: Any) -> Any:
        return whole_text(text) if isinstance(text, str) else text

    @field_validator("logprobs")
    @classmethod
    def _is_json(cls, logprobs: list[dict[str, Any]] | None, info: ValidationInfo) -> list[dict[str, Any]] | None:
        """What engines give is written as it can be read again: a number that is none becomes null."""
        if logprobs is None or info.mode == "json":
            return logprobs
        check_depth(logprobs)
        try:
            written = whole_text(json.dumps(logprobs, ensure_ascii=False))
        except TypeError as error:
            raise ValueError(f"is not JSON: {error}") from None
        return cast("list[dict[str, Any]]", json.loads(written, parse_constant=lambda _: None))


class Output(Choice):
    """What an engine produced for a task: its answer, or the first of several and the others in `more`. Of an embedding
    task `vectors` are the inputs' embeddings, each base64 of little-endian float32; of a rerank task `scores` say how
    well each input answers the query; both have an empty text."""

    more: tuple[Choice, ...] = ()
    vectors: tuple[str, ...] | None = None
    scores: tuple[Finite, ...] | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All answers."""
        return (self, *self.more)


class Delta(TolerantModel):
    """A piece of an answer while it is generated: of its text, of what the model thinks, or of a call of a tool, never
    of two of them. `index` is the choice's. `call` counts the calls of a choice; a call's `id` and `name` come once,
    with its first piece."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    call: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    @field_validator("text", "reasoning", "arguments", mode="before")
    @classmethod
    def _whole(cls, text: Any) -> Any:
        return whole_text(text) if isinstance(text, str) else text


DELTAS: TypeAdapter[list[Delta]] = TypeAdapter(list[Delta], config=ConfigDict(defer_build=True))


class Result(TolerantModel):
    """A task in its final state, as a producer gets it.

    `on_time` is the server's judgement; `latency` is submit to final state on the server's clock; `queued` is the part
    of it before an engine had the task. `output` may hold a partial text for an expired task.
    """

    id: str
    state: State
    on_time: bool
    latency: float
    queued: float | None = None
    reason: str | None = None  # why it failed, expired or was rejected
    output: Output | None = None
    receipt: Receipt | None = None

    @property
    def text(self) -> str:
        """The generated text, empty where there is none."""
        return self.output.text if self.output else ""

    @property
    def vectors(self) -> list[list[float]]:
        """An embedding task's vectors, in the order of its inputs; none where there are none."""
        return [unpack(vector).tolist() for vector in (self.output.vectors if self.output else None) or ()]


# --- what a node says of itself


class StepCost(TolerantModel):
    """Boot-time speed of one model on a node: one step costs about
    `step + sequence·active + prefill·prefilled + context·context_tokens` seconds."""

    step: NonNegative
    sequence: NonNegative
    prefill: NonNegative
    context: NonNegative = 0.0


class ModelOffer(TolerantModel):
    """One model (or one quantisation of it) a node serves: an arm of the bandit. `capabilities` are names of
    `Capability`; one of a newer version is passed on, and never needed."""

    name: Name
    context: Annotated[int, Field(gt=0)]  # tokens, prompt and output together
    kv_tokens: Annotated[int, Field(gt=0)]  # KV cache over all sequences, tokens
    chunk: Annotated[int, Field(gt=0)] | None = None  # prompt tokens prefilled in a step at most; None: not known
    calibration: StepCost
    capabilities: tuple[str, ...] = BEFORE_CAPABILITIES
    dimensions: Annotated[int, Field(gt=0)] | None = None  # numbers in its embeddings, where it makes any

    def lacks(self, needs: Iterable[str]) -> list[str]:
        """Those of the needed capabilities this model does not have."""
        return lacking(needs, self.capabilities)


class Power(TolerantModel):
    """A node's power model: watts idle and, beyond idle, while its engine steps; joules per byte on its link."""

    idle: NonNegative
    active: NonNegative
    joules_per_byte: NonNegative = 0.0
    method: str
    estimated: bool


class NodeInfo(TolerantModel):
    """A node's registration."""

    name: NodeName
    tier: Literal["edge", "cloud"]
    boot: Annotated[str, Field(min_length=1, max_length=64)]  # new at every start of the worker process
    slots: Annotated[int, Field(ge=1, le=4096)]  # answers in the engine at once; so many tasks are taken, too
    models: Annotated[tuple[ModelOffer, ...], Field(min_length=1)]
    power: Power
    bandwidth: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # bytes/s, a prior until claims have measured it
    engine: str  # e.g. "llama.cpp 0.3.36, SmolLM2 Q8_0, 1 thread"
    version: int = WIRE_VERSION

    @property
    def queue(self) -> str:
        """The Celery queue this node consumes."""
        return f"{self.tier}.{self.name}"

    def offer(self, model: str | None, needs: Sequence[str] = ()) -> ModelOffer | None:
        """The offer for `model`, or the first of those that can do what is needed when any model will do; None when
        not served here."""
        return next((m for m in self.models if model in (None, m.name) and not m.lacks(needs)), None)


class ArmBelief(TolerantModel):
    """What a policy has learned of one model on a node: its step cost now, the part of it that a standard deviation of
    a typical step is, and how many samples that rests on."""

    cost: StepCost
    spread: NonNegative = 0.0
    samples: NonNegative = 0.0


class NodeBelief(TolerantModel):
    """What a policy has learned of a node."""

    bandwidth: NonNegative  # bytes/s
    latency: NonNegative = 0.0  # s, of a transfer, beside its bytes
    dispatch_delay: NonNegative = 0.0  # s
    slot_price: float = 0.0  # units of on-time value per s
    watts: NonNegative = 0.0  # beyond idle, while it steps
    models: Mapping[str, ArmBelief] = Field(default_factory=dict)


# --- what happened: the event stream


class _Event(TolerantModel):
    at: float  # s, server clock


class _TaskEvent(_Event):
    id: str


class Submitted(_TaskEvent):
    """A task entered the pending set. All the scheduler needs to know of it, without its payload."""

    type: Literal["submitted"] = "submitted"
    deadline: Finite  # s, server clock, absolute
    value: NonNegative = 1.0
    service: str = "default"
    tenant: str = "default"
    model: str | None = None
    prompt_tokens: Count = 1  # estimate
    payload_bytes: Count = 0
    max_tokens: Count = 128
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1  # answers, each of at most max_tokens
    kind: str = "generate"
    needs: Annotated[tuple[str, ...], Field(max_length=64)] = ()  # capabilities
    fit_context: bool = False  # it ends where the context does; `max_tokens` is not the producer's
    expected_tokens: Annotated[int, Field(ge=1, lt=2**32)] | None = None
    text: str = ""  # as `perllm.broker.text_features.sketch` makes it
    start_after: NonNegative = 0.0  # s from its submission
    strikes: Count = 0
    attempt: Count = 0  # attempts made before, where this tells of a task that is older
    origin: Annotated[dict[Literal["request_id", "trace_id"], RequestId], Field(max_length=2)] = Field(
        default_factory=dict
    )  # for lines of a log


class Dispatched(_TaskEvent):
    type: Literal["dispatched"] = "dispatched"
    node: str
    model: str
    attempt: int


class Claimed(_TaskEvent):
    type: Literal["claimed"] = "claimed"
    node: str
    attempt: int


class Completed(_TaskEvent):
    """An attempt ended with a receipt: the reward. `state` is succeeded, or expired when the deadline cut it."""

    type: Literal["completed"] = "completed"
    node: str
    attempt: int
    state: State
    on_time: bool
    latency: float  # s, submit to end
    queued: float  # s, submit to claim
    receipt: Receipt


class Returned(_TaskEvent):
    """A task left its node without a result and is pending again: handed back, lease lost, or failed and retried."""

    type: Literal["returned"] = "returned"
    node: str
    attempt: int
    cause: Literal["handed_back", "lease_expired", "failed"]
    reason: str = ""
    strikes: int = 0


class Ended(_TaskEvent):
    """A task reached a final state without a receipt."""

    type: Literal["ended"] = "ended"
    state: State
    reason: str = ""
    node: str | None = None


class NodeUp(_Event):
    type: Literal["node_up"] = "node_up"
    info: NodeInfo


class Heartbeat(_Event):
    """A node's counters and, per task it runs, the tokens generated so far."""

    type: Literal["heartbeat"] = "heartbeat"
    node: str
    boot: str
    counters: Counters
    progress: dict[str, int] = Field(default_factory=dict)


class NodeDown(_Event):
    type: Literal["node_down"] = "node_down"
    node: str
    reason: str = ""


Event = Annotated[
    Submitted | Dispatched | Claimed | Completed | Returned | Ended | NodeUp | Heartbeat | NodeDown,
    Field(discriminator="type"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event, config=ConfigDict(defer_build=True))


def parse_event(raw: bytes | str) -> Event:
    """One stream entry's JSON as an event. Raises pydantic.ValidationError."""
    return _EVENT.validate_json(raw)


# --- why: the decision record


@dataclass(slots=True)
class Candidate:
    """How one node looked to the policy when a task was decided. What a policy does not compute stays None. (Many are
    made with every decision: no model, which takes ten times as long.)"""

    node: str
    index: float | None = None  # what the policy maximises
    feasible: bool = True
    finish: float | None = None  # s from now, predicted
    p_on_time: float | None = None
    marginal_energy: float | None = None  # J
    slacks: Mapping[str, float | None] = field(default_factory=dict)  # constraint → normalised slack; None: no number
    confidence: float | None = None
    note: str = ""


class Influence(TolerantModel):
    """Part of a text that makes a longer (`factor` above 1) or shorter output likely. `words` are filled in where the
    text is at hand; only their `code` travels."""

    code: int
    factor: float
    words: str = ""


class LengthForecast(TolerantModel):
    """The output length a task was believed to have: half are shorter than `median` tokens, 90 % than `most`. It goes
    by earlier tasks of its `class`, by those with like `text`, or by earlier runs of this very `prompt`."""

    median: float
    most: float
    source: Literal["class", "text", "prompt"]
    because: tuple[Influence, ...] = ()


class Explanation(TolerantModel):
    """Why a task went where it went: kept with the task, shown by `perllm explain`."""

    policy: str
    action: Literal["dispatch", "reject", "expire"]
    sentence: str
    node: str | None = None
    candidates: tuple[Candidate, ...] = ()
    length: LengthForecast | None = None
