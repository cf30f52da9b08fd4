"""What every engine checks of a request, in the same words."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from perllm.broker.capabilities import OF_KIND
from perllm.broker.engine.contract import EngineError
from perllm.broker.messages import TaskSpec


def check_kind(kind: str, model: str, capabilities: Collection[str]) -> None:
    """Raises EngineError (retry=False) for a kind of task that a model with these capabilities is not for."""
    if OF_KIND[kind] not in capabilities:
        raise EngineError(f"model: {model!r} is not one to {kind} with", retry=False)


def check_model(model: str | None, served: Iterable[str]) -> None:
    """Raises EngineError (retry=False) for a model that is not among those `served`; None means any."""
    served = list(served)
    if model is not None and model not in served:
        raise EngineError(f"model: {model!r} is not served here, only {', '.join(served)}", retry=False)


def check_context(prompt_tokens: int, max_tokens: int, context: int) -> None:
    """Raises EngineError (retry=False) for an empty prompt, and for a request that does not fit into the context."""
    if not prompt_tokens:
        raise EngineError("prompt: has no tokens", retry=False)
    if (excess := context_excess(prompt_tokens, max_tokens, context)) is not None:
        raise EngineError(f"prompt of {prompt_tokens} tokens and max_tokens {max_tokens} {excess}", retry=False)


def fitted(spec: TaskSpec, prompt_tokens: int, context: int) -> TaskSpec:
    """The task with no more `max_tokens` than its context has room for, if its answer may end there. Raises EngineError
    (retry=False) as `check_context`."""
    if spec.fit_context:
        if prompt_tokens >= context:
            reason = f"prompt of {prompt_tokens} tokens leaves no room in the context of {context} tokens: shorten it"
            raise EngineError(reason, retry=False)
        if spec.max_tokens > context - prompt_tokens:
            spec = spec.model_copy(update={"max_tokens": context - prompt_tokens})
    check_context(prompt_tokens, spec.max_tokens, context)
    return spec


def context_excess(prompt_tokens: int, max_tokens: int, context: int) -> str | None:
    """What is wrong where prompt and output together exceed the context, and the way out; None where they fit."""
    if prompt_tokens + max_tokens <= context:
        return None
    room = context - prompt_tokens
    way_out = f"lower max_tokens to {room}" if room > 0 else "shorten the prompt"
    return f"exceed the context of {context} tokens: {way_out}"


def embeddings_excess(spec: TaskSpec, width: int, most: int) -> str | None:
    """What is wrong where a task's embeddings by a model of this width would take more than `most` bytes, and the way
    out; None where they do not."""
    size = spec.model_copy(update={"dimensions": min(spec.dimensions or width, width)}).embeddings_bytes()
    if spec.kind != "embed" or size <= most:
        return None
    count = len(spec.inputs) + len(spec.input_ids)
    return (
        f"their {count} embeddings take {size} bytes, and may take {most} (PERLLM_MAX_RESULT_BYTES): "
        f"give at most {max(1, count * most // size)} inputs, or fewer 'dimensions'"
    )
