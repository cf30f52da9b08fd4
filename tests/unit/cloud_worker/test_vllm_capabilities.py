"""What a model can do in vLLM is seen in the started engine; never more than our side of it does."""

from __future__ import annotations

import pytest

from perllm.broker.capabilities import Capability as C
from perllm.broker.chat import ChatTemplate
from perllm.cloud_worker.vllm_capabilities import SERVED, Facts, capabilities

GENERATOR = Facts(frozenset({"generate"}), None, infills=False, max_logprobs=20, labels=0)
CHAT = GENERATOR._replace(template=ChatTemplate("", lambda messages, *_: messages[-1]["content"]))
THINKS = GENERATOR._replace(template=ChatTemplate("<think></think>", lambda messages, *_: messages[-1]["content"]))
PLAIN = {C.GENERATE, C.LOGPROBS, C.LOGIT_BIAS, C.GRAMMAR, C.JSON_SCHEMA, C.CHOICES, C.TOKENS}
POOLING = GENERATOR._replace(tasks=frozenset({"embed", "token_embed"}))


@pytest.mark.parametrize(
    ("facts", "can"),
    [
        (GENERATOR, PLAIN),
        (CHAT, PLAIN | {C.CHAT, C.TOOLS}),
        (THINKS, PLAIN | {C.CHAT, C.TOOLS, C.REASONING}),
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
