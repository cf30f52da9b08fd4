"""What the worker takes from vLLM: from one module only, and every symbol of it by name, so that a version without one
is known before anything is started."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import perllm.cloud_worker

FOLDER = Path(next(iter(perllm.cloud_worker.__path__)))
#: Module of vLLM → what is used of it, and of its objects.
NEEDED = {
    "vllm": ("__version__",),
    "vllm.config": (
        "CacheConfig.block_size",
        "CacheConfig.kv_cache_size_tokens",
        "CacheConfig.num_gpu_blocks",
        "ModelConfig.get_vocab_size",
        "ModelConfig.hf_config",
        "ModelConfig.max_logprobs",
        "ModelConfig.max_model_len",
        "SchedulerConfig.max_num_batched_tokens",
        "StructuredOutputsConfig.backend",
        "StructuredOutputsConfig.reasoning_parser",
        "VllmConfig.cache_config",
        "VllmConfig.model_config",
        "VllmConfig.scheduler_config",
        "VllmConfig.structured_outputs_config",
    ),
    "vllm.engine.arg_utils": (
        "AsyncEngineArgs.data_parallel_size",
        "AsyncEngineArgs.disable_log_stats",
        "AsyncEngineArgs.enable_lora",
        "AsyncEngineArgs.gpu_memory_utilization",
        "AsyncEngineArgs.kv_cache_memory_bytes",
        "AsyncEngineArgs.max_lora_rank",
        "AsyncEngineArgs.max_loras",
        "AsyncEngineArgs.max_model_len",
        "AsyncEngineArgs.max_num_seqs",
        "AsyncEngineArgs.model",
        "AsyncEngineArgs.pipeline_parallel_size",
        "AsyncEngineArgs.scheduling_policy",
        "AsyncEngineArgs.structured_outputs_config",
        "AsyncEngineArgs.tensor_parallel_size",
    ),
    "vllm.entrypoints.openai.chat_completion.protocol": ("ChatCompletionRequest.tools",),
    "vllm.entrypoints.openai.engine.protocol": (
        "DeltaMessage.content",
        "DeltaMessage.reasoning",
        "DeltaMessage.tool_calls",
    ),
    "vllm.inputs": ("tokens_input",),
    "vllm.logprobs": ("Logprob.decoded_token", "Logprob.logprob", "Logprob.rank"),
    "vllm.lora.request": ("LoRARequest.lora_int_id", "LoRARequest.lora_name", "LoRARequest.lora_path"),
    "vllm.outputs": (
        "CompletionOutput.finish_reason",
        "CompletionOutput.logprobs",
        "CompletionOutput.text",
        "CompletionOutput.token_ids",
        "PoolingOutput.data",
        "PoolingRequestOutput.num_cached_tokens",
        "PoolingRequestOutput.outputs",
        "RequestOutput.finished",
        "RequestOutput.metrics",
        "RequestOutput.num_cached_tokens",
        "RequestOutput.outputs",
        "RequestOutput.prompt_logprobs",
    ),
    "vllm.parser.abstract_parser": ("Parser.parse_delta",),
    "vllm.parser.parser_manager": ("ParserManager.get_parser",),
    "vllm.reasoning": ("ReasoningParserManager.list_registered",),
    "vllm.pooling_params": ("PoolingParams.extra_kwargs", "PoolingParams.task"),
    "vllm.sampling_params": (
        "RequestOutputKind.DELTA",
        "RequestOutputKind.FINAL_ONLY",
        "SamplingParams.detokenize",
        "SamplingParams.frequency_penalty",
        "SamplingParams.ignore_eos",
        "SamplingParams.logit_bias",
        "SamplingParams.logprobs",
        "SamplingParams.max_tokens",
        "SamplingParams.min_p",
        "SamplingParams.output_kind",
        "SamplingParams.presence_penalty",
        "SamplingParams.prompt_logprobs",
        "SamplingParams.repetition_penalty",
        "SamplingParams.seed",
        "SamplingParams.skip_special_tokens",
        "SamplingParams.stop",
        "SamplingParams.structured_outputs",
        "SamplingParams.temperature",
        "SamplingParams.top_k",
        "SamplingParams.top_p",
        "StructuredOutputsParams.grammar",
    ),
    "vllm.tool_parsers": ("ToolParserManager.list_registered",),
    "vllm.v1.engine.async_llm": (
        "AsyncLLM.abort",
        "AsyncLLM.add_lora",
        "AsyncLLM.encode",
        "AsyncLLM.errored",
        "AsyncLLM.from_engine_args",
        "AsyncLLM.generate",
        "AsyncLLM.get_supported_tasks",
        "AsyncLLM.get_tokenizer",
        "AsyncLLM.shutdown",
        "AsyncLLM.vllm_config",
    ),
    "vllm.v1.engine.exceptions": ("EngineDeadError", "EngineGenerateError"),
    "vllm.v1.metrics.loggers": ("StatLoggerBase.log_engine_initialized", "StatLoggerBase.record"),
    "vllm.v1.metrics.stats": (
        "IterationStats.finished_requests",
        "IterationStats.num_generation_tokens",
        "IterationStats.prompt_token_stats",
        "PromptTokenStats.computed",
        "RequestStateStats.first_token_ts",
        "RequestStateStats.last_token_ts",
        "RequestStateStats.scheduled_ts",
        "SchedulerStats.kv_cache_usage",
        "SchedulerStats.num_running_reqs",
        "SchedulerStats.num_skipped_waiting_reqs",
        "SchedulerStats.num_waiting_reqs",
    ),
}


def has(owner: type[Any], member: str) -> bool:
    """Whether instances of a class have this attribute: of the class, a field, an argument of its constructor, or set
    by it."""
    if hasattr(owner, member) or any(member in getattr(c, "__annotations__", ()) for c in owner.__mro__):
        return True
    if member in inspect.signature(owner).parameters:
        return True
    try:
        return hasattr(owner(), member)
    except TypeError:
        return False


def there(module: Any, symbol: str) -> bool:
    """Whether a module has this name, or this class with this attribute."""
    owner, _, member = symbol.partition(".")
    return hasattr(module, owner) and (not member or has(getattr(module, owner), member))


@pytest.mark.parametrize("module", NEEDED)
def test_vllm_has_what_the_worker_needs(module: str) -> None:
    if find_spec("vllm") is None:
        pytest.skip(f"{module}: vLLM is not installed")
    found = importlib.import_module(module)
    assert [symbol for symbol in NEEDED[module] if not there(found, symbol)] == [], f"not in {module} any more"


def imports(path: Path) -> Iterator[str]:
    """module:name of everything a file imports from vLLM."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (f"{alias.name}:__version__" for alias in node.names if alias.name.split(".")[0] == "vllm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)


def test_only_one_module_imports_vllm_and_all_of_it_is_listed() -> None:
    users = {path.name: set(imports(path)) for path in FOLDER.glob("*.py")}
    listed = {f"{module}:{name.partition('.')[0]}" for module, names in NEEDED.items() for name in names}
    assert {name for name, found in users.items() if found} == {"vllm_api.py"}
    assert users["vllm_api.py"] <= listed
