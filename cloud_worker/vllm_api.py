"""All that is bound to vLLM's own names and signatures. Imported only where vLLM is about to run.

Their list is in tests/unit/cloud_worker/test_vllm_symbols.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import vllm
from pydantic import ValidationError
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.parser.parser_manager import ParserManager
from vllm.pooling_params import PoolingParams
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from perllm.broker import grammar
from perllm.broker.chat import AnswerStream, ChatTemplate
from perllm.broker.engine.answers import answer_seed
from perllm.broker.engine.checks import check_echo, check_tokens
from perllm.broker.engine.contract import EngineError
from perllm.broker.engine.embedding import Vector
from perllm.broker.engine.text import Prompt, chat_messages, openai_tool, prompt_text
from perllm.broker.errors import BadSetting, InvalidTask, TryAgain
from perllm.broker.messages import Delta, TaskSpec
from perllm.cloud_worker.openai_api import ChunkDelta
from perllm.cloud_worker.remote_answer import RemoteAnswer
from perllm.cloud_worker.settings import CloudSettings
from perllm.cloud_worker.vllm_capabilities import INFILL_MARKS, Facts

__all__ = [
    "EngineDeadError",
    "EngineGenerateError",
    "Prompter",
    "calibration_params",
    "engine_args",
    "facts",
    "limits",
    "lora_requests",
    "numbers",
    "open_engine",
    "openai_logprobs",
    "pooling_params",
    "sampling_params",
    "tokens_input",
]

#: The versions this was tested with; others draw a warning.
TESTED = ("0.25.",)
VERSION: str = vllm.__version__
#: Ranks vLLM can reserve memory for.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

log = structlog.get_logger(__name__)

#: Called after every engine step with running and waiting requests, the KV cache's used part, tokens generated, prompt
#: tokens computed, and requests that finished.
OnStep = Callable[[int, int, float, int, int, int], None]


def engine_args(settings: CloudSettings, slots: int) -> Any:
    """What vLLM is started with; `settings.vllm_args` has the last word. Raises BadSetting."""
    given: dict[str, Any] = {
        "model": settings.model,
        "max_model_len": settings.context,
        "max_num_seqs": slots,
        "scheduling_policy": "priority",
        # What checks grammars and schemas before a task is taken, so that what passes there passes here
        "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),
        "disable_log_stats": True,  # its own logs of them: ours are a stat logger beside
    }
    if settings.adapters:
        ranks = [_rank(name, path) for name, path in settings.adapters.items()]
        given |= {
            "enable_lora": True,
            "max_loras": len(ranks),
            "max_lora_rank": next((r for r in LORA_RANKS if r >= max(ranks)), max(ranks)),
        }
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    if unknown := sorted(set(settings.vllm_args) - known):
        raise BadSetting(f"PERLLM_VLLM_ARGS: {', '.join(unknown)}: vLLM {VERSION} has no such engine argument")
    return AsyncEngineArgs(**(given | settings.vllm_args))


def _rank(name: str, path: Path) -> int:
    try:
        return int(json.loads((path / "adapter_config.json").read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadSetting(
            f"PERLLM_ADAPTERS: {name}: {path} is no LoRA adapter ({type(error).__name__}: {error})"
        ) from None


def open_engine(args: Any, on_step: OnStep) -> Any:
    """Start the engine (its processes load the model: seconds to minutes). In the event loop that is to own it.

    Raises BadSetting for what the configuration rules out, RuntimeError when the engine's processes fail.
    """
    if not VERSION.startswith(TESTED):
        log.warning("vllm_untested", version=VERSION, tested=TESTED)

    class StepLogger(StatLoggerBase):  # type: ignore[misc, unused-ignore]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:
            if scheduler_stats is not None:
                on_step(
                    scheduler_stats.num_running_reqs,
                    scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                    scheduler_stats.kv_cache_usage,
                    iteration_stats.num_generation_tokens if iteration_stats else 0,
                    iteration_stats.prompt_token_stats.computed if iteration_stats else 0,
                    len(iteration_stats.finished_requests) if iteration_stats else 0,
                )

        def log_engine_initialized(self) -> None: ...

    try:
        return AsyncLLM.from_engine_args(args, stat_loggers=[StepLogger])
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]["msg"].removeprefix("Value error, ")
        raise BadSetting(f"vLLM cannot serve PERLLM_MODEL={args.model}: {first}") from None
    except (ValueError, OSError) as error:
        raise BadSetting(f"vLLM cannot serve PERLLM_MODEL={args.model}: {error}") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a started engine has room for."""

    kv_tokens: int  # of its KV cache
    context: int  # tokens of one sequence
    step_tokens: int  # computed in one step, at most
    vocabulary: int  # token ids


def limits(llm: Any) -> Limits:
    """Those of an engine `open_engine` started."""
    config = llm.vllm_config
    cache = config.cache_config
    return Limits(
        # A model that sees all tokens at once keeps none: it takes one input at least.
        kv_tokens=int(
            cache.kv_cache_size_tokens
            or (cache.num_gpu_blocks or 0) * cache.block_size
            or config.model_config.max_model_len
        ),
        context=int(config.model_config.max_model_len),
        step_tokens=int(config.scheduler_config.max_num_batched_tokens),
        vocabulary=int(config.model_config.get_vocab_size()),
    )


def facts(llm: Any, tasks: frozenset[str], template: ChatTemplate | None) -> Facts:
    """What there is to see of an engine `open_engine` started, beside the `tasks` it says it can do."""
    config, vocabulary = llm.vllm_config, llm.get_tokenizer().get_vocab()
    return Facts(
        tasks=tasks,
        template=template,
        infills=any(before in vocabulary and after in vocabulary for before, after in INFILL_MARKS),
        max_logprobs=int(config.model_config.max_logprobs),
        labels=int(getattr(config.model_config.hf_config, "num_labels", 0)),
    )


def lora_requests(adapters: Mapping[str, Path], prefix: str) -> dict[str, Any]:
    """Name for producers → what vLLM calls the adapter by."""
    return {
        f"{prefix}:{name}": LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))
        for number, (name, path) in enumerate(adapters.items(), start=1)
    }


def sampling_params(spec: TaskSpec, max_tokens: int, prompt: Prompt) -> list[Any]:
    """`spec` in vLLM's terms, for each of its answers to `prompt`. Raises EngineError (retry=False) for what vLLM does
    not accept.

    Each answer is a request to vLLM, as it would itself make of `n`: the prompt is computed once, by its prefix cache.
    (Its own `n` is refused at temperature 0, and ends early when an answer does before the last one was added.)
    """
    structured = None
    plain = prompt.form.plain and not prompt.foreign
    try:
        if not prompt.foreign and (text := grammar.lark(spec, prompt.form, prompt.controls)) is not None:
            structured = StructuredOutputsParams(grammar=text)
        return [_answer_params(spec, max_tokens, structured, index, plain=plain) for index in range(spec.n)]
    except InvalidTask as error:
        raise EngineError(str(error), retry=isinstance(error, TryAgain)) from None
    except ValueError as error:
        raise EngineError(f"vLLM does not accept it: {error}", retry=False) from None


def _answer_params(spec: TaskSpec, max_tokens: int, structured: Any, index: int, *, plain: bool) -> Any:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        repetition_penalty=spec.repeat_penalty,
        seed=None if spec.seed is None else answer_seed(spec.seed, index),
        stop=list(spec.stop) if plain else [],  # a thought or a call may contain them
        skip_special_tokens=plain,
        logprobs=spec.logprobs,
        prompt_logprobs=spec.logprobs if spec.echo and index == 0 else None,
        logit_bias=dict(spec.logit_bias) or None,
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
    )


def pooling_params(kind: str, second: int | None = None) -> Any:
    """For one input of an embedding or rerank task; of a pair, `second` is where the second text's tokens begin, where
    the model wants to know."""
    extra = None if second is None else {"compressed_token_type_ids": second}
    return PoolingParams(task="embed" if kind == "embed" else "classify", extra_kwargs=extra)


def numbers(output: Any) -> Vector:
    """What came of one input: its vector, its scores, or nothing where it was aborted."""
    vector: Vector = output.outputs.data.float().cpu().numpy().reshape(-1)
    return vector


def calibration_params(tokens: int) -> Any:
    """For calibration: exactly so many tokens, and no text."""
    return SamplingParams(
        max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, temperature=0.0
    )


def openai_logprobs(tokens: Sequence[int], positions: Sequence[Mapping[int, Any]], top: int) -> list[dict[str, Any]]:
    """vLLM's log-probabilities as entries of the OpenAI API's `logprobs.content`: under the model itself, before
    penalties and temperature."""
    return [
        _entry(position[token])
        | {
            "top_logprobs": [
                _entry(one) for one in sorted(position.values(), key=lambda p: p.rank or 0) if (one.rank or 0) <= top
            ]
        }
        for token, position in zip(tokens, positions, strict=True)
    ]


def _entry(one: Any) -> dict[str, Any]:
    text = one.decoded_token or ""
    return {"token": text, "logprob": one.logprob, "bytes": list(text.encode())}


class PooledInput(NamedTuple):
    """An input's tokens, and where the second text of a pair begins, where the tokenizer says so."""

    ids: Sequence[int]
    second: int | None = None


class Prompter:
    """Renders tasks with the model's chat template, and tokenises them, in the caller's thread."""

    def __init__(self, llm: Any, settings: CloudSettings) -> None:
        """Raises BadSetting for parsers that vLLM does not have."""
        self._tokenizer: Any = copy.deepcopy(llm.get_tokenizer())  # vLLM's own is in use by its loop
        self._vocabulary = limits(llm).vocabulary
        self._lock = threading.Lock()
        source = getattr(self._tokenizer, "chat_template", None) or ""
        named = "\n".join(source.values()) if isinstance(source, dict) else source
        template = ChatTemplate(named, self._rendered)
        self.template = template if template.chats else None
        self._controls = self._find_controls() if self.template is not None else {}
        self._parser = _parser_class(settings)
        self._loops_tokenizer = copy.deepcopy(self._tokenizer) if self._parser is not None else None

    def prompt(self, spec: TaskSpec) -> Prompt:
        """Raises EngineError (retry=False)."""
        if spec.prompt_ids is not None:
            check_tokens("prompt_ids", spec.prompt_ids, self._vocabulary)
            return Prompt(list(spec.prompt_ids))
        if spec.suffix is not None:
            raise EngineError("suffix: this engine does not fill in; leave it out", retry=False)
        foreign = self._parser is not None and not grammar.is_held(spec)
        with self._lock:
            text, form = prompt_text(spec, self.template, foreign=foreign)
            if self.template is None:
                return Prompt(list(self._tokenizer.encode(text)))
            tokens = list(self._tokenizer.encode(text, add_special_tokens=False))
        return Prompt(tokens, form, self._controls, foreign)

    def inputs(self, spec: TaskSpec) -> list[PooledInput]:
        """The tokens of an embedding or rerank task's inputs; what is ranked, beside its query."""
        with self._lock:
            if spec.input_ids:
                return [PooledInput(ids) for ids in spec.input_ids]
            if spec.kind == "embed":
                return [PooledInput(self._tokenizer.encode(text)) for text in spec.inputs]
            return [self._pair(spec.query or "", text) for text in spec.inputs]

    def _pair(self, query: str, text: str) -> PooledInput:
        encoded = self._tokenizer(query, text)
        ids, types = encoded["input_ids"], encoded.get("token_type_ids")
        return PooledInput(ids, None if types is None else types.index(1) if 1 in types else len(ids))

    def answer(self, spec: TaskSpec, prompt: Prompt, task_id: str, index: int) -> AnswerStream | None:
        """What takes one answer to a prompt apart; None where all of it is text."""
        if prompt.foreign:
            assert self._parser is not None
            parser = VLLMParser(self._parser, self._loops_tokenizer, spec, prompt.tokens)
            return AnswerStream(stops=spec.stop, index=index, parser=parser)
        return None if prompt.form.plain else AnswerStream(prompt.form, spec.stop, task_id, index)

    def echo(self, spec: TaskSpec) -> str:
        """What the text is to begin with. Raises EngineError (retry=False)."""
        if not spec.echo:
            return ""
        if spec.prompt_ids is not None:
            with self._lock:
                return str(self._tokenizer.decode(list(spec.prompt_ids), skip_special_tokens=True))
        check_echo(spec, as_it_is=self.template is None)
        return spec.prompt or ""

    def prompt_logprobs(self, tokens: Sequence[int], positions: Sequence[Any], top: int) -> list[dict[str, Any]]:
        """As `openai_logprobs`, of a prompt: its first token has none, since nothing foretells it."""
        if not positions:
            return []
        with self._lock:
            text = str(self._tokenizer.decode(list(tokens[:1])))
        first = {"token": text, "logprob": None, "bytes": list(text.encode()), "top_logprobs": []}
        return [first, *openai_logprobs(tokens[1:], positions[1:], top)]

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, more: dict[str, Any]
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **more
            )
        )

    def _find_controls(self) -> dict[str, int]:
        """Those of the marks in answers that are, or contain, control tokens."""
        assert self.template is not None
        special = {token: str(added) for token, added in self._tokenizer.added_tokens_decoder.items() if added.special}
        tokens = {t for mark in self.template.marks for t in self._tokenizer.encode(mark, add_special_tokens=False)}
        return {special[token]: token for token in sorted(tokens & special.keys())}


def _parser_class(settings: CloudSettings) -> Any:
    """vLLM's own parser, as set; None: ours is used. Raises BadSetting."""
    tool, reasoning = settings.tool_parser, settings.reasoning_parser
    for setting, name, known in (
        ("PERLLM_TOOL_PARSER", tool, ToolParserManager.list_registered),
        ("PERLLM_REASONING_PARSER", reasoning, ReasoningParserManager.list_registered),
    ):
        if name is not None and name not in (names := known()):
            raise BadSetting(f"{setting}: vLLM {VERSION} has no {name!r}, but: {', '.join(names)}")
    return ParserManager.get_parser(tool, reasoning, enable_auto_tools=True)


class VLLMParser:
    """vLLM's own parser of one answer, as ours are used."""

    def __init__(self, parser: Any, tokenizer: Any, spec: TaskSpec, prompt: Sequence[int]) -> None:
        tools = [openai_tool(tool) for tool in spec.offered_tools]
        self._request = ChatCompletionRequest.model_validate(
            {"messages": chat_messages(spec), "chat_template_kwargs": spec.chat_template_kwargs}
            | ({"tools": tools, "tool_choice": "auto"} if tools else {})
        )
        self._parser = parser(tokenizer, self._request.tools)
        self._prompt = list(prompt)
        self._answer = RemoteAnswer()  # its pieces are those of a server

    @property
    def thinking(self) -> bool:
        return not self._answer.text and not self._answer.calls

    @property
    def thought(self) -> bool:
        return self._answer.reasoning is not None

    @property
    def complete(self) -> bool:
        return self._answer.called

    def push(self, text: str, tokens: Sequence[int] = ()) -> list[Delta]:
        """Returns the pieces that are certain by it. Raises EngineError for what the parser fails at."""
        return self._take(text, tokens, finished=False)

    def finish(self, *, cut: bool) -> list[Delta]:  # noqa: ARG002  vLLM's parsers do not ask
        """The last pieces."""
        return [*self._take("", (), finished=True), *self._answer.close()]

    def _take(self, text: str, tokens: Sequence[int], *, finished: bool) -> list[Delta]:
        try:
            piece = self._parser.parse_delta(
                text, list(tokens), self._request, prompt_token_ids=self._prompt, finished=finished
            )
            if piece is None:
                return []
            return self._answer.take(ChunkDelta.model_validate(piece.model_dump()), len(tokens))
        except Exception as error:  # theirs are of many kinds, and this is one request's
            raise EngineError(f"vLLM's parser failed: {type(error).__name__}: {error}", retry=False) from None
