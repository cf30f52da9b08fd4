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
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from perllm.broker import grammar
from perllm.broker.engine.chat_template import TemplateFacts, look_at_template
from perllm.broker.engine.contract import EngineError
from perllm.broker.engine.embedding import Vector
from perllm.broker.engine.text import prompt_text
from perllm.broker.errors import BadSetting, InvalidTask, TryAgain
from perllm.broker.messages import TaskSpec
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


def facts(llm: Any, tasks: frozenset[str], template: TemplateFacts) -> Facts:
    """What there is to see of an engine `open_engine` started, beside the `tasks` it says it can do."""
    config, vocabulary = llm.vllm_config, llm.get_tokenizer().get_vocab()
    return Facts(
        tasks=tasks,
        template=template,
        infills=any(before in vocabulary and after in vocabulary for before, after in INFILL_MARKS),
        max_logprobs=int(config.model_config.max_logprobs),
        labels=int(getattr(config.model_config.hf_config, "num_labels", 0)),
        reasoning_parser=config.structured_outputs_config.reasoning_parser,
    )


def lora_requests(adapters: Mapping[str, Path], prefix: str) -> dict[str, Any]:
    """Name for producers → what vLLM calls the adapter by."""
    return {
        f"{prefix}:{name}": LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))
        for number, (name, path) in enumerate(adapters.items(), start=1)
    }


def sampling_params(spec: TaskSpec, max_tokens: int) -> Any:
    """`spec` in vLLM's terms. Raises EngineError (retry=False) for what vLLM does not accept."""
    structured = None
    try:
        if (text := grammar.lark(spec)) is not None:
            structured = StructuredOutputsParams(grammar=text)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
            min_p=spec.min_p,
            presence_penalty=spec.presence_penalty,
            frequency_penalty=spec.frequency_penalty,
            repetition_penalty=spec.repeat_penalty,
            seed=spec.seed,
            stop=list(spec.stop),
            logprobs=spec.logprobs,
            structured_outputs=structured,
            output_kind=RequestOutputKind.DELTA,
        )
    except InvalidTask as error:
        raise EngineError(str(error), retry=isinstance(error, TryAgain)) from None
    except ValueError as error:
        raise EngineError(f"vLLM does not accept it: {error}", retry=False) from None


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

    def __init__(self, llm: Any) -> None:
        self._tokenizer: Any = copy.deepcopy(llm.get_tokenizer())  # vLLM's own is in use by its loop
        self._lock = threading.Lock()
        source = getattr(self._tokenizer, "chat_template", None) or ""
        named = "\n".join(source.values()) if isinstance(source, dict) else source
        self.template = look_at_template(named, self._rendered)
        self._template = self._rendered if self.template.chats else None

    def tokens(self, spec: TaskSpec) -> list[int]:
        """The prompt's tokens. Raises EngineError (retry=False)."""
        with self._lock:
            text = prompt_text(spec, self._template)
            if self._template is None:
                return list(self._tokenizer.encode(text))
            return list(self._tokenizer.encode(text, add_special_tokens=False))

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

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        return str(
            self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        )
