"""What a GGUF model can do on an edge node, found by looking at it: its metadata, its chat template, its vocabulary.

Each capability is one line of `capabilities`. What the engine itself does not do is not in `SERVED`, whatever the model
could.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from perllm.broker.capabilities import Capability
from perllm.broker.engine.chat_template import NO_TEMPLATE, TemplateFacts, look_at_template
from perllm.edge_worker.gguf import POOLINGS
from perllm.edge_worker.llama import Model

#: `<architecture>.pooling_type` in a GGUF's metadata (`enum llama_pooling_type` in llama.h): how the embeddings of its
#: tokens become a text's. A generator has none.
NO_POOLING, RANK_POOLING = 0, 4

#: What the engine does.
SERVED = frozenset(
    {Capability.GENERATE, Capability.CHAT, Capability.LOGPROBS, Capability.GRAMMAR, Capability.JSON_SCHEMA}
)


class LoadedFacts(NamedTuple):
    """What only llama.cpp can say of a model."""

    decodes: bool  # one token after the other: no encoder, no diffusion
    infills: bool  # its vocabulary marks what comes before and after a gap
    classes: int  # outputs of its classifier


#: The same where it pools.
SERVED_POOLED = frozenset({Capability.EMBEDDINGS, Capability.RERANK, Capability.TOKENS})


def look(metadata: Mapping[str, Any], model: Model, pooling: str | None = None) -> tuple[Capability, ...]:
    """What a loaded model can do here. With `pooling` (a value of `POOLINGS`) it is used so, whatever its metadata
    says."""
    facts = LoadedFacts(decodes=model.generates, infills=model.infills, classes=model.classes)
    if pooling is None:
        return capabilities(metadata, look_at_gguf_template(model.chat_template()), facts)
    key = f"{metadata.get('general.architecture', '')}.pooling_type"
    number = next(number for number, name in POOLINGS.items() if name == pooling)
    return capabilities({**metadata, key: number}, NO_TEMPLATE, facts, served=SERVED_POOLED)


def capabilities(
    metadata: Mapping[str, Any], template: TemplateFacts, facts: LoadedFacts, *, served: Set[Capability] = SERVED
) -> tuple[Capability, ...]:
    """What a model with this metadata, template and vocabulary can do on an engine that does what is `served`,
    sorted."""
    architecture = metadata.get("general.architecture", "")
    pooling = metadata.get(f"{architecture}.pooling_type", NO_POOLING)
    causal = metadata.get(f"{architecture}.attention.causal", True)
    generates = facts.decodes and bool(causal) and pooling == NO_POOLING
    embeds = pooling not in (NO_POOLING, RANK_POOLING)
    can = {
        Capability.GENERATE: generates,
        Capability.CHAT: generates and template.chats,
        Capability.TOOLS: generates and template.chats,  # shown in our own words where the template has none for them
        Capability.REASONING: generates and template.thinks,
        Capability.LOGPROBS: generates,
        Capability.LOGIT_BIAS: generates,
        Capability.GRAMMAR: generates,
        Capability.JSON_SCHEMA: generates,
        Capability.CHOICES: generates,
        Capability.INFILL: generates and facts.infills,
        Capability.TOKENS: generates or embeds,
        Capability.EMBEDDINGS: embeds,
        Capability.RERANK: pooling == RANK_POOLING and facts.classes == 1,
    }
    return tuple(sorted(capability for capability, able in can.items() if able and capability in served))


def look_at_gguf_template(source: str | None) -> TemplateFacts:
    """What the Jinja template of a GGUF can do."""
    if not source:
        return NO_TEMPLATE
    try:
        formatter: Any = Jinja2ChatFormatter(source, eos_token="", bos_token="")
    except Exception:  # it is no template: a Jinja error, of many kinds
        return NO_TEMPLATE
    return look_at_template(source, lambda messages, tools: str(formatter(messages=messages, tools=tools).prompt))
