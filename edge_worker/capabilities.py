"""What a GGUF model can do on an edge node, found by looking at it: its metadata, its chat template, its vocabulary.

Each capability is one line of `capabilities`. What the engine itself does not do is not in `SERVED`, whatever the model
could.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from perllm.broker.capabilities import Capability
from perllm.broker.chat import ChatTemplate
from perllm.edge_worker.gguf import POOLINGS
from perllm.edge_worker.llama import Model

#: `<architecture>.pooling_type` in a GGUF's metadata (`enum llama_pooling_type` in llama.h): how the embeddings of its
#: tokens become a text's. A generator has none.
NO_POOLING, RANK_POOLING = 0, 4

#: What the engine does.
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
        Capability.INFILL,
        Capability.TOKENS,
    }
)


class LoadedFacts(NamedTuple):
    """What only llama.cpp can say of a model."""

    decodes: bool  # one token after the other: no encoder, no diffusion
    infills: bool  # its vocabulary marks what comes before and after a gap
    classes: int  # outputs of its classifier


#: The same where it pools.
SERVED_POOLED = frozenset({Capability.EMBEDDINGS, Capability.RERANK, Capability.TOKENS})


def look(
    metadata: Mapping[str, Any], model: Model, template: ChatTemplate | None, pooling: str | None = None
) -> tuple[Capability, ...]:
    """What a loaded model can do here. With `pooling` (a value of `POOLINGS`) it is used so, whatever its metadata
    says."""
    facts = LoadedFacts(decodes=model.generates, infills=model.infills, classes=model.classes)
    if pooling is None:
        return capabilities(metadata, template, facts)
    key = f"{metadata.get('general.architecture', '')}.pooling_type"
    number = next(number for number, name in POOLINGS.items() if name == pooling)
    return capabilities({**metadata, key: number}, None, facts, served=SERVED_POOLED)


def capabilities(
    metadata: Mapping[str, Any], template: ChatTemplate | None, facts: LoadedFacts, *, served: Set[Capability] = SERVED
) -> tuple[Capability, ...]:
    """What a model with this metadata, template and vocabulary can do on an engine that does what is `served`,
    sorted."""
    architecture = metadata.get("general.architecture", "")
    pooling = metadata.get(f"{architecture}.pooling_type", NO_POOLING)
    causal = metadata.get(f"{architecture}.attention.causal", True)
    generates = facts.decodes and bool(causal) and pooling == NO_POOLING
    embeds = pooling not in (NO_POOLING, RANK_POOLING)
    chats = generates and template is not None
    can = {
        Capability.GENERATE: generates,
        Capability.CHAT: chats,
        Capability.TOOLS: chats,  # shown in our own words where the template has none for them
        Capability.REASONING: chats and template is not None and template.thought is not None,
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
