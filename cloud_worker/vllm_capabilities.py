"""What a model can do in vLLM, found by looking at the started engine: the tasks its runner has, its chat template and
its vocabulary.

Each capability is one line of `capabilities`. What our side of vLLM does not do is not in `SERVED`, whatever vLLM can.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from perllm.broker.capabilities import Capability
from perllm.broker.chat import ChatTemplate

#: What `vllm_engine` does.
SERVED = frozenset(
    {
        Capability.GENERATE,
        Capability.CHAT,
        Capability.TOOLS,
        Capability.REASONING,
        Capability.LOGPROBS,
        Capability.LOGIT_BIAS,
        Capability.GRAMMAR,
        Capability.JSON_SCHEMA,
        Capability.CHOICES,
        Capability.TOKENS,
    }
)
#: The same of a model that vLLM runs to pool.
SERVED_POOLED = frozenset({Capability.EMBEDDINGS, Capability.RERANK, Capability.TOKENS})
#: Marks of what comes before and after a gap, by families of models, as their vocabularies spell them.
INFILL_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>"),  # Qwen coder
    ("<fim_prefix>", "<fim_suffix>"),  # StarCoder, Granite code
    ("<fim-prefix>", "<fim-suffix>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>"),  # DeepSeek coder
    ("<PRE>", "<SUF>"),  # CodeLlama
    ("[PREFIX]", "[SUFFIX]"),  # Codestral
)


class Facts(NamedTuple):
    """What was seen of a started engine. `tasks` are vLLM's names (its `SupportedTask`)."""

    tasks: frozenset[str]
    template: ChatTemplate | None
    infills: bool
    max_logprobs: int
    labels: int  # of a classifier


def capabilities(facts: Facts, *, served: Set[Capability] = SERVED) -> tuple[Capability, ...]:
    """What such an engine can do where our side does what is `served`, sorted."""
    generates = "generate" in facts.tasks
    embeds = "embed" in facts.tasks
    chats = generates and facts.template is not None
    can = {
        Capability.GENERATE: generates,
        Capability.CHAT: chats,
        Capability.TOOLS: chats,  # shown in our own words where the template has none for them
        Capability.REASONING: chats and facts.template is not None and facts.template.thought is not None,
        Capability.LOGPROBS: generates and facts.max_logprobs != 0,
        Capability.LOGIT_BIAS: generates,
        Capability.GRAMMAR: generates,
        Capability.JSON_SCHEMA: generates,
        Capability.CHOICES: generates,
        Capability.INFILL: generates and facts.infills,
        Capability.TOKENS: generates or embeds,
        Capability.EMBEDDINGS: embeds,
        Capability.RERANK: "classify" in facts.tasks and facts.labels == 1,
    }
    return tuple(sorted(capability for capability, able in can.items() if able and capability in served))
