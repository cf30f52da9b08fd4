"""What a GGUF can do is seen in its metadata, template and vocabulary; never more than the engine does."""

from __future__ import annotations

from typing import Any

import pytest

from perllm.broker.capabilities import Capability as C
from perllm.broker.chat import ChatTemplate
from perllm.edge_worker.capabilities import RANK_POOLING, SERVED, LoadedFacts, capabilities
from perllm.edge_worker.gguf import read_gguf
from perllm.edge_worker.model_files import default_gguf
from perllm.edge_worker.sampling import gguf_template

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT = gguf_template(TURNS)
THINKS = gguf_template(TURNS + "<|im_start|>assistant\n<think>\n</think>")
DECODER = LoadedFacts(decodes=True, infills=False, classes=1)
EVERYTHING = frozenset(C)
ANY_GENERATOR = {C.GENERATE, C.LOGPROBS, C.LOGIT_BIAS, C.GRAMMAR, C.JSON_SCHEMA, C.CHOICES, C.TOKENS}


@pytest.mark.parametrize(
    ("metadata", "template", "facts", "can"),
    [
        ({}, None, DECODER, ANY_GENERATOR),
        ({}, CHAT, DECODER, ANY_GENERATOR | {C.CHAT, C.TOOLS}),
        ({}, THINKS, DECODER, ANY_GENERATOR | {C.CHAT, C.TOOLS, C.REASONING}),
        ({}, None, DECODER._replace(infills=True), ANY_GENERATOR | {C.INFILL}),
        ({"x.pooling_type": 0}, None, DECODER, ANY_GENERATOR),
        # BERT, and a decoder that was made an embedding model: with a chat template left over
        ({"x.pooling_type": 1, "x.attention.causal": False}, None, DECODER, {C.EMBEDDINGS, C.TOKENS}),
        ({"x.pooling_type": 3}, THINKS, DECODER, {C.EMBEDDINGS, C.TOKENS}),
        # A reranker, and a classifier that is none
        ({"x.pooling_type": RANK_POOLING}, CHAT, DECODER, {C.RERANK}),
        ({"x.pooling_type": RANK_POOLING}, CHAT, DECODER._replace(classes=3), set()),
        # An encoder that says nothing of pooling; a diffusion model
        ({"x.attention.causal": False}, None, DECODER, set()),
        ({}, CHAT, DECODER._replace(decodes=False), set()),
    ],
)
def test_a_model_can_what_it_is_made_for(
    metadata: dict[str, Any], template: ChatTemplate | None, facts: LoadedFacts, can: set[C]
) -> None:
    metadata = {"general.architecture": "x"} | metadata
    assert capabilities(metadata, template, facts, served=EVERYTHING) == tuple(sorted(can))
    assert set(capabilities(metadata, template, facts)) == can & SERVED


@pytest.mark.parametrize(
    "source",
    [
        "",
        "{% for m in",
        "{% for x in %}",
        "{{ 1 / 0 }}",
        "{% set loop %}{{ raise_exception('system only') }}{% endset %}",
        "{{ query }} {{ document }}",
    ],
)
def test_a_template_that_does_not_chat_is_none(source: str) -> None:
    assert gguf_template(source) is None


def test_a_template_that_refuses_tools_chats_all_the_same() -> None:
    template = gguf_template("{% if tools %}{{ 1 / 0 }}{% endif %}{# <think></think> tools #}" + TURNS)
    assert template is not None
    assert not template.native


def test_the_template_of_the_default_model_chats_and_knows_no_tools() -> None:
    template = gguf_template(str(read_gguf(default_gguf()).metadata["tokenizer.chat_template"]))
    assert template is not None
    assert not template.native
    assert template.thought is None
