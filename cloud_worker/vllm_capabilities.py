"""What a model can do in vLLM, found by looking at the started engine: the tasks its runner has, its chat template, its
vocabulary and the parsers it was started with.

Each capability is one line of `capabilities`. What our side of vLLM does not do is not in `SERVED`, whatever vLLM can.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from perllm.broker.capabilities import Capability
from perllm.broker.engine.chat_template import TemplateFacts

#: What `vllm_engine` does.
SERVED = frozenset(
    {Capability.GENERATE, Capability.CHAT, Capability.LOGPROBS, Capability.GRAMMAR, Capability.JSON_SCHEMA}
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
    template: TemplateFacts
    infills: bool
    max_logprobs: int
    labels: int  # of a classifier
    tool_parser: str = ""
    reasoning_parser: str = ""


def capabilities(facts: Facts, *, served: Set[Capability] = SERVED) -> tuple[Capability, ...]:
    """What such an engine can do where our side does what is `served`, sorted."""
    generates = "generate" in facts.tasks
    embeds = "embed" in facts.tasks
    chats = generates and facts.template.chats
    can = {
        Capability.GENERATE: generates,
        Capability.CHAT: chats,
        Capability.TOOLS: chats and facts.template.shows_tools and bool(facts.tool_parser),
        Capability.REASONING: chats and facts.template.thinks and bool(facts.reasoning_parser),
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
