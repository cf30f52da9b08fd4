"""What a model on a node can do, and so what a task may need of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import Protocol


class Capability(StrEnum):
    """One thing a model can do. Engines find out by looking at the model; nothing is assumed."""

    GENERATE = "generate"  # makes text
    CHAT = "chat"  # has a chat template: takes messages
    TOOLS = "tools"  # takes tools, and answers with calls of them
    REASONING = "reasoning"  # thinks before it answers, apart from the answer
    LOGPROBS = "logprobs"
    LOGIT_BIAS = "logit_bias"
    GRAMMAR = "grammar"  # keeps to a GBNF grammar
    JSON_SCHEMA = "json_schema"  # keeps to a JSON schema
    CHOICES = "choices"  # several answers to one prompt
    INFILL = "infill"  # fills in between a prompt and a suffix
    TOKENS = "tokens"  # takes token ids for text
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"


#: What each kind of task needs first of all.
OF_KIND = {"generate": Capability.GENERATE, "embed": Capability.EMBEDDINGS, "rerank": Capability.RERANK}

#: What a node of a version that did not say could do.
BEFORE_CAPABILITIES = (
    Capability.GENERATE,
    Capability.CHAT,
    Capability.LOGPROBS,
    Capability.GRAMMAR,
    Capability.JSON_SCHEMA,
)

#: Models a sentence names of those that could have served a task.
MAX_NAMED = 5


class Offer(Protocol):
    """A model and what it can do."""

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> tuple[str, ...]: ...


def lacking(needs: Iterable[str], capabilities: Collection[str]) -> list[str]:
    """Those of the needed capabilities that are not among these."""
    return [need for need in needs if need not in capabilities]


def unserved(model: str | None, needs: Collection[str], live: Iterable[Offer], gone: Iterable[Offer]) -> str | None:
    """Why no live offer can do all of this (for a task that named this model, or none), and who would; None where one
    can. `gone` are the offers of nodes that are down or draining."""
    live, gone = list(live), list(gone)
    asked = [offer for offer in live if model in (None, offer.name)]
    if any(not lacking(needs, offer.capabilities) for offer in asked):
        return None
    nobody = [need for need in needs if all(need not in offer.capabilities for offer in asked)]
    what = ", ".join(nobody or needs)
    able = [offer for offer in live if not lacking(needs, offer.capabilities)]
    if able:  # so the task named another
        return f"{what}: {model} does not offer {'it' if len(nobody) == 1 else 'that'}, but {_names(able)} does"
    were = [offer for offer in gone if not lacking(nobody or needs, offer.capabilities)]
    if were:
        return f"{what}: offered by {_names(were)}; no live node serves it"
    if not nobody:
        return f"{what}: no live node's model can do all of these at once (`perllm nodes` shows what each can)"
    return f"{what}: no node has offered it; start one whose model can (`perllm nodes` shows what each can do)"


def _names(offers: Iterable[Offer]) -> str:
    names = sorted({offer.name for offer in offers})
    return ", ".join(names[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")
