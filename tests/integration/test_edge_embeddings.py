"""The edge engine as one that embeds and reranks: against llama.cpp itself, how it stops, what it refuses, what it
counts. The models are tiny ones with random weights; they go through all of llama.cpp."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_gguf import CLS, MEAN, RANK, tiny_bert
from support.wait import eventually

from perllm.broker.engine.contract import EngineError, Generation, Stop
from perllm.broker.errors import BadSetting
from perllm.broker.messages import TaskSpec
from perllm.broker.vectors import unpack
from perllm.edge_worker.embedding_batch import STEP_INPUTS
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.settings import EdgeSettings

TEXTS = ["the sky", "word", "hello world, the sky is 42!", "a b c d e f g " * 4, "why?", "z"]


def start(model: Path, **more: Any) -> LlamaEngine:
    engine = LlamaEngine(EdgeSettings(model=str(model), threads=1, slots=4, **more))
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    one = start(tiny_bert(tmp_path_factory.mktemp("bert") / "bert.gguf"))
    yield one
    one.close()


def embed(engine: LlamaEngine, *inputs: str, seconds: float = 60, task_id: str = "t", **fields: Any) -> Generation:
    return engine.generate(task_id, TaskSpec(kind="embed", inputs=inputs, **fields), Stop(seconds))


def vectors(done: Generation) -> np.ndarray[Any, Any]:
    assert done.output.vectors is not None
    return np.array([unpack(vector) for vector in done.output.vectors])


def alike(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Whether unit vectors are the same but for rounding."""
    return bool(((one * other).sum(axis=-1) > 0.9999).all())


# --- what it gives


@pytest.mark.parametrize(("pooling", "setting"), [(MEAN, None), (None, "cls")])
def test_inputs_together_equal_llama_cpps_own_one_by_one(tmp_path: Path, pooling: int | None, setting: Any) -> None:
    from llama_cpp import Llama  # noqa: PLC0415

    path = tiny_bert(tmp_path / "bert.gguf", pooling=pooling)
    kind = {} if setting is None else {"pooling_type": CLS}
    peer = Llama(str(path), embedding=True, n_ctx=128, n_threads=1, flash_attn=True, verbose=False, **kind)
    engine = start(path, pooling=setting)
    try:
        done = embed(engine, *TEXTS * 30)  # several steps
        theirs = np.array([peer.embed(text, normalize=True) for text in TEXTS])
        assert alike(vectors(done), np.tile(theirs, (30, 1)))
        assert np.allclose(np.linalg.norm(vectors(done), axis=1), 1, atol=1e-6)
        assert done.prompt_tokens == 30 * sum(len(peer.tokenize(text.encode(), special=False)) for text in TEXTS)
        assert (done.completion_tokens, done.output.text, done.output.finish_reason) == (0, "", "stop")
    finally:
        engine.close()
        peer.close()


def test_a_generator_embeds_beside_where_its_pooling_is_set(tiny: Path) -> None:
    from llama_cpp import LLAMA_POOLING_TYPE_LAST, Llama  # noqa: PLC0415

    peer = Llama(
        str(tiny), embedding=True, n_ctx=256, n_threads=1, flash_attn=True, verbose=False,
        pooling_type=LLAMA_POOLING_TYPE_LAST,
    )  # fmt: skip
    engine = start(tiny, pooling="last", context=256)
    try:
        own, embedder = engine.offers()
        assert embedder.name == f"{own.name}:embed"
        assert "embeddings" not in own.capabilities
        assert embedder.capabilities == ("embeddings", "tokens")
        assert (own.dimensions, embedder.dimensions) == (None, 32)
        assert embedder.calibration != own.calibration
        assert alike(vectors(embed(engine, *TEXTS)), np.array([peer.embed(text, normalize=True) for text in TEXTS]))
        assert engine.generate("g", TaskSpec(prompt="hi", max_tokens=3), Stop(60)).completion_tokens == 3
        totals = engine.counters()  # each has its part of them
        assert totals.models[own.name].context_steps == totals.context_steps > 0
        for total in ("steps", "prefilled", "sequence_steps"):
            parts = [getattr(part, total) for part in totals.models.values()]
            assert sum(parts) == getattr(totals, total) > max(parts)
        assert None not in (own.chunk, embedder.chunk)
        for kind, name in (("embed", own.name), ("rerank", embedder.name), ("generate", embedder.name)):
            given: Any = {"prompt": "hi"} if kind == "generate" else {"inputs": ("a",)}
            given |= {"query": "q"} if kind == "rerank" else {}
            with pytest.raises(EngineError, match=f"is not one to {kind} with") as refused:
                engine.generate("x", TaskSpec(kind=kind, model=name, **given), Stop(60))
            assert not refused.value.retry
    finally:
        engine.close()
        peer.close()


def test_dimensions_cut_and_lengthen_to_one_again(engine: LlamaEngine) -> None:
    whole, cut = vectors(embed(engine, *TEXTS)), vectors(embed(engine, *TEXTS, dimensions=5))
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    assert cut.shape == (len(TEXTS), 5)
    assert np.allclose(cut, expected, atol=1e-6)


def test_token_ids_are_taken_as_they_are(engine: LlamaEngine) -> None:
    (served,) = engine._pool._all.values()
    assert served.loaded is not None
    ids = [served.loaded.model.tokenize(text, special=False, add_bos=True) for text in TEXTS]
    spec = TaskSpec(kind="embed", input_ids=tuple(map(tuple, ids)))
    assert alike(vectors(engine.generate("t", spec, Stop(60))), vectors(embed(engine, *TEXTS)))


def test_a_reranker_scores_each_document_beside_the_query(tmp_path: Path) -> None:
    engine = start(tiny_bert(tmp_path / "rank.gguf", pooling=RANK))
    try:
        (offer,) = engine.offers()
        assert offer.capabilities == ("rerank",)
        spec = TaskSpec(kind="rerank", query="the sky", inputs=tuple(TEXTS))
        done = engine.generate("t", spec, Stop(60))
        assert done.output.scores is not None
        assert len(set(done.output.scores)) == len(TEXTS)
        for text, score in zip(TEXTS, done.output.scores, strict=True):
            alone = engine.generate("t", TaskSpec(kind="rerank", query="the sky", inputs=(text,)), Stop(60))
            assert alone.output.scores == pytest.approx((score,), abs=1e-2)
        other = engine.generate("t", TaskSpec(kind="rerank", query="word", inputs=tuple(TEXTS)), Stop(60))
        assert other.output.scores != done.output.scores
        # as BERT's rerankers were trained: [CLS] query [SEP] document [SEP]
        assert done.prompt_tokens == alone.prompt_tokens + sum(
            engine.generate("t", TaskSpec(kind="rerank", query="the sky", inputs=(t,)), Stop(60)).prompt_tokens
            for t in TEXTS[:-1]
        )
    finally:
        engine.close()


# --- company


def test_tasks_side_by_side_get_what_each_gets_alone(engine: LlamaEngine) -> None:
    groups = [[f"{word} {number}" for number in range(150)] for word in TEXTS]
    alone = [vectors(embed(engine, *group)) for group in groups]
    before = engine.counters()
    with ThreadPoolExecutor(len(groups)) as threads:
        done = list(threads.map(lambda i: embed(engine, *groups[i], task_id=f"t{i}"), range(len(groups))))
    for mine, expected in zip(done, alone, strict=True):
        assert alike(vectors(mine), expected)
    after = engine.counters()
    assert after.prefilled - before.prefilled == sum(each.prompt_tokens for each in done)
    assert after.sequence_steps - before.sequence_steps == 150 * len(groups)
    assert after.generated == before.generated
    assert all(each.energy.inference > 0 for each in done)
    assert (after.active, after.waiting) == (0, 0)


def test_a_single_text_does_not_wait_for_thousands(engine: LlamaEngine) -> None:
    """It joins the next step, whatever is left of those before it."""
    many = ["word " * 40] * 2000
    with ThreadPoolExecutor(2) as threads:
        bulk = threads.submit(lambda: embed(engine, *many, task_id="bulk"))
        eventually(lambda: engine.counters().active == 1, "the many are in")
        steps = engine.counters().steps
        single = embed(engine, "why?", task_id="single")
        assert single.after.steps - steps < 20
        assert len(vectors(bulk.result())) == 2000


def test_a_step_takes_no_more_inputs_than_llama_cpp_has_sequences(engine: LlamaEngine) -> None:
    assert len(vectors(embed(engine, *["a"] * (3 * STEP_INPUTS + 1)))) == 3 * STEP_INPUTS + 1


# --- how it ends otherwise


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
def test_it_stops_within_a_step(engine: LlamaEngine, how: str) -> None:
    stop = Stop(60 if how == "cancelled" else 0.3)
    spec = TaskSpec(kind="embed", inputs=("word " * 40,) * 2048)
    before = engine.counters()
    if how == "cancelled":
        threading.Timer(0.05, stop.cancel).start()
    while True:  # until one was long enough to be stopped
        done = engine.generate("t", spec, stop)
        if done.output.finish_reason != "stop":
            break
    assert done.output.finish_reason == how
    assert done.output.vectors is None
    assert engine.counters().active == 0
    assert done.after.prefilled >= before.prefilled
    assert len(vectors(embed(engine, "a"))) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"inputs": ("a", "word " * 200)}, r"^input 1 has 202 tokens; the model takes 128 in one input$"),
        ({"input_ids": ((5,), (5, 4000))}, r"^input 1: 4000 is no token; the model knows 91$"),
        ({"inputs": ("a",), "dimensions": 33}, r"^dimensions: 33 is more than the model's vectors have, 32$"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_its_number(engine: LlamaEngine, fields: Any, said: str) -> None:
    with pytest.raises(EngineError, match=said) as refused:
        engine.generate("t", TaskSpec(kind="embed", **fields), Stop(60))
    assert not refused.value.retry
    assert embed(engine, "a").prompt_tokens == 3


def test_an_encoder_that_does_not_say_its_pooling_needs_the_setting(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="PERLLM_POOLING"):
        start(tiny_bert(tmp_path / "bert.gguf", pooling=None))
