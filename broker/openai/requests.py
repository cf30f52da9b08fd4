"""The request bodies of the OpenAI endpoints, field by field: what the door accepts, the OpenAPI document shows and
docs/http-api.md lists.

Only names decide here, and the values of fields that are refused. Other values are checked when the translated task is
(`TaskSpec`), so these models are read and never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from perllm.broker.errors import InvalidTask
from perllm.broker.messages import (
    MAX_CHOICES,
    MAX_DEADLINE,
    MAX_DIMENSIONS,
    MAX_INPUTS,
    MAX_SCHEMA,
    MAX_TOOLS,
    StrictModel,
)

#: Most prompts of one completion request.
MAX_PROMPTS = 128


class Ignored:
    """Marks a field that is accepted so that existing programs and files work, and that changes nothing."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": f"Accepted, without effect: {self.why}."}


class Refused:
    """Marks a field that is known and refused, unless it asks for nothing: one of these values."""

    def __init__(self, sentence: str, *usual: Any) -> None:
        self.sentence, self.usual = sentence, usual

    def allows(self, value: Any) -> bool:
        return any(value == usual and type(value) is type(usual) for usual in self.usual)

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.usual], "description": f"Refused: {self.sentence}."}


def _about(text: str) -> Any:
    return Field(description=text)


Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
Deadline = Annotated[
    Annotated[float, Field(gt=0, le=MAX_DEADLINE)] | str,
    Field(description="ours: seconds from now, or a time (RFC 3339), by which the answer is needed", examples=[30]),
]
Value = Annotated[float, Field(gt=0, le=1e6, description="ours: the weight when not all can be on time")]
Service = Annotated[
    str, Field(max_length=128, description="ours: the class whose lengths and rewards are learned together")
]
ExpectedTokens = Annotated[Tokens, _about("ours: a guess of the output's length, no limit")]
ModelName = Annotated[str, Field(description="a model on offer (`/v1/models`); `auto`, or none: any", max_length=128)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="up to 16 pairs of text, kept with the task and sent with its events"),
]
Schema = dict[str, Any]
Prompt = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]

_NO_CACHE_KEYS = Ignored("prefixes are shared by what they are, without keys")
_NO_IMAGES = Ignored("there are no images in it")


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", defer_build=True)


class TextPart(_Part):
    type: Literal["text", "input_text", "output_text", "summary_text", "reasoning_text"]
    text: str


class FunctionCall(_Part):
    name: str
    arguments: str


class CalledTool(_Part):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None


class StreamOptions(_Part):
    include_usage: bool = False


class OpenAIRequest(StrictModel):
    """What every request for text may say."""

    model: ModelName | None = Field(None, description="a model on offer (`/v1/models`); `auto`, or none: any")
    deadline: Deadline | None = Field(None, description="ours: by when the answer is needed: seconds, or a time")
    value: Value = 1.0
    service: Service = "default"
    expected_tokens: ExpectedTokens | None = Field(None, description="ours: a guess of the output's length, no limit")
    metadata: Metadata = Field(default_factory=dict)

    temperature: Annotated[float, Field(ge=0, le=2)] = Field(0.0, description="0 unless given: the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="only the likeliest tokens of this mass")
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = Field(0, description="only so many of the likeliest; 0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="only tokens so likely, by the likeliest's")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(0.0, description="as OpenAI's")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(0.0, description="as OpenAI's")
    repeat_penalty: Annotated[float, Field(gt=0, le=2)] = Field(1.0, description="llama.cpp's")
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = Field(1.0, description="vLLM's name of `repeat_penalty`")
    seed: int | None = Field(None, description="any integer, taken modulo 2³²")
    stop: str | list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        None, description="up to 16 texts before which the answer ends"
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="by token id, added before one is drawn"
    )
    response_format: Schema | None = Field(None, description="`text`, `json_object`, or `json_schema` with a schema")
    json_schema: Schema | None = Field(None, description="llama.cpp's: a schema of the answer")
    grammar: Annotated[str, Field(max_length=MAX_SCHEMA)] | None = Field(
        None, description="llama.cpp's: a GBNF grammar of the answer"
    )
    guided_json: Schema | str | None = Field(None, description="vLLM's: a schema of the answer")
    guided_grammar: Annotated[str, Field(max_length=MAX_SCHEMA)] | None = Field(
        None, description="vLLM's: a GBNF grammar of the answer"
    )
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=256)] | None = Field(
        None, description="vLLM's: the answer is one of these texts"
    )
    guided_regex: Annotated[Any, Refused("regular expressions are not supported: give a grammar")] = None
    structured_outputs: Schema | None = Field(None, description="vLLM's: `json`, `choice` or `grammar`")

    stream: bool = Field(False, description="server-sent events as OpenAI's")

    cache_prompt: Annotated[Any, Ignored("llama.cpp's; shared prefixes are kept where that helps")] = None
    safety_identifier: Annotated[Any, Ignored("nothing is reported about end users")] = None
    service_tier: Annotated[Any, Ignored("`deadline` and `value` say how urgent a task is")] = None
    store: Annotated[Any, Ignored("an answer is kept as every task's result is; `DELETE` forgets it")] = None
    user: Annotated[Any, Ignored("nothing is reported about end users")] = None


class _WithMaxTokens(OpenAIRequest):
    max_tokens: Tokens | None = Field(None, description="most tokens of each answer")
    max_completion_tokens: Tokens | None = Field(None, description="the same; goes before `max_tokens`")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = Field(1, description="so many answers, up to 16")
    stream_options: StreamOptions | None = Field(None, description="`include_usage`: the tokens follow the last chunk")


class _WithTools(OpenAIRequest):
    tools: Annotated[list[Schema], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="functions the model may call, up to 128; `strict` holds arguments to the schema"
    )
    tool_choice: str | Schema | None = Field(
        None, description="`auto`, `none`, `required`, one named function, or `allowed_tools`"
    )
    parallel_tool_calls: bool | None = Field(None, description="whether one answer may have several calls")
    chat_template_kwargs: Schema | None = Field(None, description="vLLM's and llama.cpp's: for the chat template")

    prompt_cache_key: Annotated[Any, _NO_CACHE_KEYS] = None
    prompt_cache_options: Annotated[Any, _NO_CACHE_KEYS] = None
    prompt_cache_retention: Annotated[Any, _NO_CACHE_KEYS] = None

    moderation: Annotated[Any, Refused("answers are not moderated here")] = None


class ChatRequest(_WithMaxTokens, _WithTools):
    """A chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] = Field(
        description="turns, with text, calls of tools and their answers; `developer` counts as `system`"
    )
    logprobs: bool | None = Field(None, description="log probabilities of the answer's tokens")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="and of so many alternatives")
    reasoning_effort: str | None = Field(
        None, description="`none`, `minimal`, `low`, `medium`, `high` or `xhigh`; `max` counts as `xhigh`"
    )
    functions: Annotated[list[Schema], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="the older form of `tools`; answered by `function_call`"
    )
    function_call: str | Schema | None = Field(None, description="the older form of `tool_choice`")

    background: Annotated[Any, Ignored("a chat is waited for; `/v1/responses` has it")] = None
    verbosity: Annotated[Any, Ignored("ask for it in a message: models here have no such setting")] = None

    audio: Annotated[Any, Refused("answers are text")] = None
    modalities: Annotated[Any, Refused("answers are text", ["text"])] = None
    prediction: Annotated[Any, Refused("predicted outputs are not supported")] = None
    web_search_options: Annotated[Any, Refused("there is no web search here: offer one as a function")] = None


class CompletionRequest(_WithMaxTokens):
    """A completion. A prompt of text is one user turn of the model's chat template."""

    prompt: (
        Prompt
        | TokenIds
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="a text or its token ids, or up to 128 of either, a task each; in a batch one a line")
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="log probabilities of the answer's tokens, and of so many alternatives"
    )
    echo: bool = Field(False, description="the answer begins with the prompt; with `logprobs`, those of token ids too")
    suffix: str | None = Field(None, description="what comes after the answer; the prompt is text")

    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="only the same as `n`: no answers are left out"
    )
    background: Annotated[Any, Ignored("a completion is waited for; `/v1/responses` has it")] = None


class ResponseRequest(_WithTools):
    """A response. With `background` the answer comes at once and the response is to be retrieved."""

    input: Prompt | list[Schema] = Field(
        description="a text, or items: messages, `function_call`, `function_call_output`, `reasoning`, `item_reference`"
    )
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: Tokens | None = Field(None, description="most tokens of the answer, its reasoning included")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="log probabilities of the tokens, and of so many alternatives"
    )
    previous_response_id: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="goes on from that response, without its instructions"
    )
    text: Schema | None = Field(None, description="`format` as `response_format`; `verbosity` has no effect")
    reasoning: Schema | None = Field(
        None, description="`effort` as `reasoning_effort`; with a `summary`, the whole thought is given as one"
    )
    include: list[str] | None = Field(
        None, description="`message.output_text.logprobs`; what else there is to include is never there"
    )
    background: bool = Field(False, description="answer at once; retrieve it, or stream it, later")
    background_options: Schema | None = Field(
        None, description="a `completion_window` of `2h` or `8h` is the deadline, unless one is given"
    )

    access_programs: Annotated[Any, Ignored("there are no access programs here")] = None
    image: Annotated[Any, _NO_IMAGES] = None
    stream_options: Annotated[Any, Ignored("the last event has the tokens in any case")] = None
    max_tool_calls: Annotated[Any, Ignored("it bounds calls of built-in tools, of which there are none")] = None

    context_management: Annotated[Any, Refused("contexts are not compacted here: shorten the input", [])] = None
    conversation: Annotated[Any, Refused("conversations are not kept here: give `previous_response_id`")] = None
    n: Annotated[Any, Refused("a response is one answer: ask for several by chat completions", 1)] = None
    prompt: Annotated[Any, Refused("stored prompts are not supported: give `input`")] = None
    truncation: Annotated[Any, Refused("input is never cut: shorten it", "disabled")] = None


class _OfInputs(StrictModel):
    """What requests say whose answers are numbers."""

    model: ModelName | None = Field(None, description="a model on offer (`/v1/models`); `auto`, or none: any")
    deadline: Deadline | None = Field(None, description="ours: by when the answer is needed: seconds, or a time")
    value: Value = 1.0
    service: Service = "default"
    metadata: Metadata = Field(default_factory=dict)
    user: Annotated[Any, Ignored("nothing is reported about end users")] = None


class EmbeddingsRequest(_OfInputs):
    """Embeddings of up to 2,048 inputs: of a text or texts, or of texts given as the ids of their tokens."""

    input: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_INPUTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="a text or its token ids, or up to 2,048 of either; each fits into the model's context")
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = Field(
        None, description="only so many numbers of each embedding, of length 1 again"
    )
    encoding_format: Literal["float", "base64"] = Field("float", description="`float`, or `base64` of float32")


class TextDocument(_Part):
    text: Prompt


class RerankRequest(_OfInputs):
    """How well each of up to 2,048 documents answers a query."""

    query: Prompt = Field(description="what the documents are to answer")
    documents: Annotated[list[Prompt | TextDocument], Field(min_length=1, max_length=MAX_INPUTS)] = Field(
        description="texts, or objects with a `text`; up to 2,048"
    )
    top_n: Annotated[int, Field(ge=1)] | None = Field(None, description="only so many results, the best")
    return_documents: bool = Field(True, description="whether each result has its document")


M = TypeVar("M", Ignored, Refused)


def marker(model: type[BaseModel], field: str, kind: type[M]) -> M | None:
    """The marker of a field of a request."""
    return next((found for found in model.model_fields[field].metadata if isinstance(found, kind)), None)


@cache
def _fields(model: type[BaseModel]) -> dict[str, Ignored | Refused | None]:
    return {name: marker(model, name, Ignored) or marker(model, name, Refused) for name in model.model_fields}


def given(model: type[BaseModel], body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that say something: those that are null or ignored are left out. Raises InvalidTask for one
    that is refused, or not known."""
    known = _fields(model)
    found = {}
    for name, value in body.items():
        if name not in known:
            raise InvalidTask(f"{name}: not a field of this request")
        if value is None:
            continue
        match known[name]:
            case None:
                found[name] = value
            case Refused() as refused if not refused.allows(value):
                raise InvalidTask(f"{name}: {refused.sentence}")
    return found


def marked(model: type[BaseModel]) -> Iterator[tuple[str, Ignored | Refused | None, str]]:
    """Every field of a request, its marker, and what is to be said of it."""
    for name, mark in _fields(model).items():
        match mark:
            case Ignored():
                yield name, mark, mark.why
            case Refused():
                yield name, mark, mark.sentence
            case None:
                yield name, None, model.model_fields[name].description or ""
