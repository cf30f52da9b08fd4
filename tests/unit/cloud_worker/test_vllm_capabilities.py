"""What a model can do in vLLM is seen in the started engine; never more than our side of it does."""

from __future__ import annotations

import pytest

from perllm.broker.capabilities import Capability as C
from perllm.broker.engine.chat_template import NO_TEMPLATE, TemplateFacts
from perllm.cloud_worker.vllm_capabilities import SERVED, Facts, capabilities

GENERATOR = Facts(frozenset({"generate"}), NO_TEMPLATE, infills=False, max_logprobs=20, labels=0)
CHAT = GENERATOR._replace(template=TemplateFacts(chats=True, shows_tools=True, thinks=True))
PLAIN = {C.GENERATE, C.LOGPROBS, C.LOGIT_BIAS, C.GRAMMAR, C.JSON_SCHEMA, C.CHOICES, C.TOKENS}
POOLING = GENERATOR._replace(tasks=frozenset({"embed", "token_embed"}))


@pytest.mark.parametrize(
    ("facts", "can"),
    [
        (GENERATOR, PLAIN),
        (CHAT, PLAIN | {C.CHAT}),  # without parsers, what it writes of calls and thoughts stays text
        (CHAT._replace(tool_parser="hermes"), PLAIN | {C.CHAT, C.TOOLS}),
        (CHAT._replace(reasoning_parser="qwen3"), PLAIN | {C.CHAT, C.REASONING}),
        (GENERATOR._replace(tool_parser="hermes", reasoning_parser="qwen3"), PLAIN),
        (GENERATOR._replace(max_logprobs=0), PLAIN - {C.LOGPROBS}),
        (GENERATOR._replace(max_logprobs=-1, infills=True), PLAIN | {C.INFILL}),
        (POOLING, {C.EMBEDDINGS, C.TOKENS}),
        (POOLING._replace(tasks=frozenset({"classify"}), labels=1), {C.RERANK}),
        (POOLING._replace(tasks=frozenset({"classify"}), labels=5), set()),
        (POOLING._replace(tasks=frozenset({"transcription"})), set()),
    ],
)
def test_an_engine_can_what_it_was_started_for(facts: Facts, can: set[C]) -> None:
    assert capabilities(facts, served=frozenset(C)) == tuple(sorted(can))
    assert set(capabilities(facts)) == can & SERVED
