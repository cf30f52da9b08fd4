"""The request bodies of the OpenAI endpoints, field by field: what the translation accepts, and the OpenAPI document
says.

Only the names decide here. Values are checked when the translated task is (`TaskSpec`), so these models are read and
never run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from perllm.broker.messages import (
    MAX_DEADLINE,
    MAX_DIMENSIONS,
    MAX_INPUTS,
    MAX_SCHEMA,
    StrictModel,
    TokenId,
    TokenIds,
)

Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
Deadline = Annotated[
    Annotated[float, Field(gt=0, le=MAX_DEADLINE)] | str,
    Field(description="Ours: seconds from now, or a time (RFC 3339), by which the answer is needed.", examples=[30]),
]
Value = Annotated[float, Field(gt=0, le=1e6, description="Ours: the weight when not all can be on time.")]
Service = Annotated[
    str, Field(max_length=128, description="Ours: the class whose lengths and rewards are learned together.")
]
ExpectedTokens = Annotated[Tokens, Field(description="Ours: a guess of the output's length.")]
ModelName = Annotated[str, Field(description="A model on offer (`/v1/models`); `auto`, or none: any.", max_length=128)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class NoEffect:
    """Marks a field that is accepted so that existing programs and files work, and that changes nothing."""

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": "Accepted, without effect."}


class Only:
    """Marks a field that is accepted where it asks for nothing beyond the usual: one of these values."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values), "description": "Accepted where it asks for nothing beyond the usual."}


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", defer_build=True)


class TextPart(_Part):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]


class TextDocument(_Part):
    text: Annotated[str, Field(min_length=1)]


class StreamOptions(_Part):
    include_usage: bool = False


class OpenAIRequest(StrictModel):
    """What every request may say. Tools, audio and several choices are not supported and are refused by name."""

    model: ModelName | None = None
    deadline: Deadline | None = None
    value: Value = 1.0
    service: Service = "default"
    expected_tokens: ExpectedTokens | None = None
    metadata: Metadata = Field(default_factory=dict)

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repeat_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stop: str | list[Annotated[str, Field(min_length=1, max_length=256)]] | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: (
        Annotated[dict[str, Any], Field(description="`text`, `json_object`, or `json_schema` with a schema.")] | None
    ) = None
    grammar: Annotated[str, Field(max_length=MAX_SCHEMA, description="Ours: a GBNF grammar of the output.")] | None = (
        None
    )

    stream: bool = False
    stream_options: StreamOptions | None = None

    background: Annotated[Any, NoEffect()] = None
    parallel_tool_calls: Annotated[Any, NoEffect()] = None
    prompt_cache_key: Annotated[Any, NoEffect()] = None
    prompt_cache_retention: Annotated[Any, NoEffect()] = None
    safety_identifier: Annotated[Any, NoEffect()] = None
    service_tier: Annotated[Any, NoEffect()] = None
    store: Annotated[Any, NoEffect()] = None
    user: Annotated[Any, NoEffect()] = None

    best_of: Annotated[Any, Only(1)] = None
    echo: Annotated[Any, Only(False)] = None
    include: Annotated[Any, Only([])] = None
    logit_bias: Annotated[Any, Only({})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    n: Annotated[Any, Only(1)] = None
    suffix: Annotated[Any, Only("")] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    tools: Annotated[Any, Only([])] = None
    truncation: Annotated[Any, Only("disabled")] = None


class ChatRequest(OpenAIRequest):
    """A chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Tokens | None = None


class CompletionRequest(OpenAIRequest):
    """A completion. The prompt is one user turn of the model's chat template."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: Tokens | None = None


class ResponseRequest(OpenAIRequest):
    """A response. With `background` the answer comes at once and the response is to be retrieved."""

    input: Annotated[str, Field(min_length=1)] | list[ChatMessage]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    text: Annotated[dict[str, Any], Field(description="`format` as `response_format`; `verbosity` has no effect.")] | (
        None
    ) = None
    background: bool = False


class EmbeddingsRequest(StrictModel):
    """Embeddings of up to 2,048 inputs: of a text or texts, or of texts given as the ids of their tokens."""

    model: ModelName | None = None
    input: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)],
        Field(description="What is to be embedded; each input fits into the model's context."),
    ]
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    deadline: Deadline | None = None
    value: Value = 1.0
    service: Service = "default"
    metadata: Metadata = Field(default_factory=dict)
    user: Annotated[Any, NoEffect()] = None


class RerankRequest(StrictModel):
    """How well each of up to 2,048 documents answers a query."""

    model: ModelName | None = None
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[list[Annotated[str, Field(min_length=1)] | TextDocument], Field(min_length=1, max_length=2048)]
    top_n: Annotated[int, Field(ge=1, description="Only so many results, the best.")] | None = None
    return_documents: bool = True
    deadline: Deadline | None = None
    value: Value = 1.0
    service: Service = "default"
    metadata: Metadata = Field(default_factory=dict)
    user: Annotated[Any, NoEffect()] = None


M = TypeVar("M", NoEffect, Only)


def marked(marker: type[M]) -> Iterator[tuple[str, M]]:
    """The fields every request may carry that have such a marker, and the marker."""
    for name, field in OpenAIRequest.model_fields.items():
        yield from ((name, found) for found in field.metadata if isinstance(found, marker))
