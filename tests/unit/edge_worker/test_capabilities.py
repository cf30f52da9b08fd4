"""What a GGUF can do is seen in its metadata, template and vocabulary; never more than the engine does."""

from __future__ import annotations

from typing import Any

import pytest

from perllm.broker.capabilities import Capability as C
from perllm.broker.engine.chat_template import NO_TEMPLATE, TemplateFacts
from perllm.edge_worker.capabilities import RANK_POOLING, SERVED, LoadedFacts, capabilities, look_at_gguf_template

CHAT = TemplateFacts(chats=True, shows_tools=False, thinks=False)
THINKS = TemplateFacts(chats=True, shows_tools=True, thinks=True)
DECODER = LoadedFacts(decodes=True, infills=False, classes=1)
EVERYTHING = frozenset(C)
ANY_GENERATOR = {C.GENERATE, C.LOGPROBS, C.LOGIT_BIAS, C.GRAMMAR, C.JSON_SCHEMA, C.CHOICES, C.TOKENS}


@pytest.mark.parametrize(
    ("metadata", "template", "facts", "can"),
    [
        ({}, NO_TEMPLATE, DECODER, ANY_GENERATOR),
        ({}, CHAT, DECODER, ANY_GENERATOR | {C.CHAT, C.TOOLS}),
        ({}, THINKS, DECODER, ANY_GENERATOR | {C.CHAT, C.TOOLS, C.REASONING}),
        ({}, NO_TEMPLATE, DECODER._replace(infills=True), ANY_GENERATOR | {C.INFILL}),
        ({"x.pooling_type": 0}, NO_TEMPLATE, DECODER, ANY_GENERATOR),
        # BERT, and a decoder that was made an embedding model: with a chat template left over
        ({"x.pooling_type": 1, "x.attention.causal": False}, NO_TEMPLATE, DECODER, {C.EMBEDDINGS, C.TOKENS}),
        ({"x.pooling_type": 3}, THINKS, DECODER, {C.EMBEDDINGS, C.TOKENS}),
        # A reranker, and a classifier that is none
        ({"x.pooling_type": RANK_POOLING}, CHAT, DECODER, {C.RERANK}),
        ({"x.pooling_type": RANK_POOLING}, CHAT, DECODER._replace(classes=3), set()),
        # An encoder that says nothing of pooling; a diffusion model
        ({"x.attention.causal": False}, NO_TEMPLATE, DECODER, set()),
        ({}, CHAT, DECODER._replace(decodes=False), set()),
    ],
)
def test_a_model_can_what_it_is_made_for(
    metadata: dict[str, Any], template: TemplateFacts, facts: LoadedFacts, can: set[C]
) -> None:
    metadata = {"general.architecture": "x"} | metadata
    assert capabilities(metadata, template, facts, served=EVERYTHING) == tuple(sorted(can))
    assert set(capabilities(metadata, template, facts)) == can & SERVED


def test_a_broken_template_is_none() -> None:
    assert look_at_gguf_template("{% for x in %}") == NO_TEMPLATE
    assert look_at_gguf_template("{% set loop %}{{ raise_exception('system only') }}{% endset %}") == NO_TEMPLATE
    assert look_at_gguf_template(None) == NO_TEMPLATE


def test_the_template_of_the_default_model_chats_and_knows_no_tools() -> None:
    from perllm.edge_worker.gguf import read_gguf  # noqa: PLC0415
    from perllm.edge_worker.model_files import default_gguf  # noqa: PLC0415

    assert look_at_gguf_template(read_gguf(default_gguf()).metadata["tokenizer.chat_template"]) == CHAT
