"""What a model on a node can do, and so what a task may need of it."""

from __future__ import annotations

from enum import StrEnum


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


#: What a node of a version that did not say could do.
BEFORE_CAPABILITIES = (
    Capability.GENERATE,
    Capability.CHAT,
    Capability.LOGPROBS,
    Capability.GRAMMAR,
    Capability.JSON_SCHEMA,
)
