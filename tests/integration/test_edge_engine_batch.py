"""The batch under pressure, with a tiny model of random weights: shared prefixes, a full KV cache, variants, any mix of
requests and cancels, and files llama.cpp cannot take."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_gguf import U32, pair, tiny_llama
from support.wait import eventually

from perllm.broker.engine.contract import EngineError, Generation, Stop
from perllm.broker.errors import BadSetting
from perllm.broker.messages import Delta, Message, TaskSpec
from perllm.edge_worker import sampling
from perllm.edge_worker.batch import Answer, Batch
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.gguf import read_gguf
from perllm.edge_worker.kv_cells import KVCells
from perllm.edge_worker.llama import ABORTED, OK, Context, Model
from perllm.edge_worker.model_pool import SCRATCH
from perllm.edge_worker.prefix_cache import PrefixCache
from perllm.edge_worker.settings import EdgeSettings

KV_BYTES = 256  # per token of the tiny model


def started(tiny: Path, cached_prompts: int = 8, **fields: Any) -> LlamaEngine:
    cache = tiny.parent / "cache"
    edge = EdgeSettings(model=str(tiny), model_cache=cache, threads=1, **({"slots": 4} | fields))
    engine = LlamaEngine(edge, cached_prompts=cached_prompts)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[LlamaEngine]:
    one = started(tiny)
    yield one
    one.close()


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Iterator[LlamaEngine]:
    """One that shares no prefixes."""
    one = started(tiny, cached_prompts=0)
    yield one
    one.close()


def chat(system: str, user: str, **fields: Any) -> TaskSpec:
    return TaskSpec(messages=(Message(role="system", content=system), Message(role="user", content=user)), **fields)


def endless(engine: LlamaEngine) -> dict[int, float]:
    """A bias against every token that would end a text: it is as long as it may be."""
    (batch,) = engine._pool.batches
    return {token: -100.0 for token in range(batch.model.vocab_size) if batch.model.ends(token)}


def nothing_left(engine: LlamaEngine) -> bool:
    """Whether all slots, cells and places are free again, and no count of cells was wrong."""
    (batch,), counters = engine._pool.batches, engine.counters()
    inside = (counters.active, counters.waiting, batch._inside(), dict(engine.progress()))
    free = (counters.free_kv, sorted(batch._unused))
    return (inside, free) == ((0, 0, [], {}), (engine.offers()[0].kv_tokens, list(range(engine.slots))))


def all_of(engine: LlamaEngine, specs: list[TaskSpec]) -> list[Generation]:
    with ThreadPoolExecutor(len(specs)) as pool:
        jobs = [pool.submit(engine.generate, str(i), spec, Stop(120)) for i, spec in enumerate(specs)]
        return [job.result() for job in jobs]


# --- shared prefixes


def test_a_repeated_system_prompt_is_prefilled_once(engine: LlamaEngine) -> None:
    system = "You answer in rhyme. " * 20
    first = engine.generate("a", chat(system, "One?", max_tokens=3), Stop(60))
    before = engine.counters().prefilled
    second = engine.generate("b", chat(system, "And two?", max_tokens=3), Stop(60))
    assert first.cached_tokens < 20  # at most the template's own prefix
    assert 80 < second.cached_tokens < second.prompt_tokens
    assert engine.counters().prefilled - before == second.prompt_tokens - second.cached_tokens


def test_requests_at_once_share_it_too(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All wait before the first step: one computes the common prefix, the others wait for it."""
    may_step, step = threading.Event(), engine._step

    def step_when_all_wait(batch: Batch) -> None:
        may_step.wait(60)
        step(batch)

    monkeypatch.setattr(engine, "_step", step_when_all_wait)
    system = "Never say please. " * 60
    before = engine.counters().prefilled
    specs = [chat(system, f"Question {i}", max_tokens=20) for i in range(4)]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(engine.generate, str(i), spec, Stop(120)) for i, spec in enumerate(specs)]
        eventually(lambda: engine.counters().waiting == 4, "all four requests wait")
        may_step.set()
        done = [job.result() for job in jobs]
    prefilled = engine.counters().prefilled - before
    assert prefilled == sum(d.prompt_tokens - d.cached_tokens for d in done)
    assert prefilled < done[0].prompt_tokens + 3 * 20


def test_sharing_changes_no_words(plain: LlamaEngine, engine: LlamaEngine) -> None:
    """The shared part is the same computation; with 32-bit weights even near ties hold."""
    specs = [chat("Be brief. " * 30, f"Number {i}", max_tokens=12) for i in range(5)]
    shared = [engine.generate("t", spec, Stop(60)) for spec in specs]
    assert sum(d.cached_tokens > 0 for d in shared) >= 4
    alone = [plain.generate("t", spec, Stop(60)) for spec in specs]
    assert all(d.cached_tokens == 0 for d in alone)
    assert [d.output.text for d in shared] == [d.output.text for d in alone]


def test_cached_prompts_make_room(engine: LlamaEngine) -> None:
    """They never keep a request out, and stay within their share."""
    kv = engine.offers()[0].kv_tokens
    for i in range(12):
        engine.generate("t", TaskSpec(prompt=f"{i} " * 600, max_tokens=2), Stop(60))
    (batch,) = engine._pool.batches
    assert batch._cells.reusable <= kv / 4
    assert batch._cells.free + batch._cells.reusable == kv == engine.counters().free_kv


# --- several answers


def test_each_answer_is_what_a_task_with_its_seed_gives(engine: LlamaEngine) -> None:
    """With 32-bit weights also token for token; whether they fit into the slots or take turns."""
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "max_tokens": 9, "prompt": "Tell me something new."}
    options |= {"frequency_penalty": 0.5, "stop": ("z",)}
    for n in (3, 11):
        before = engine.counters()
        done = engine.generate("t", TaskSpec(n=n, seed=2**32 - 3, **options), Stop(120))
        prefilled = engine.counters().prefilled - before.prefilled
        texts = [choice.text for choice in done.output.choices]
        alone = [
            engine.generate("t", TaskSpec(seed=(2**32 - 3 + i) % (2**32 - 1), **options), Stop(60)) for i in range(n)
        ]
        assert texts == [one.output.text for one in alone]
        assert len(set(texts)) > n // 2
        assert [c.tokens for c in done.output.choices] == [one.completion_tokens for one in alone]
        assert done.completion_tokens == sum(c.tokens for c in done.output.choices)
        assert done.prompt_tokens == alone[0].prompt_tokens
        assert prefilled <= done.prompt_tokens - done.cached_tokens + n  # the prompt once, and a token for each turn
        assert nothing_left(engine)


def test_the_prompt_is_computed_once_where_no_prefix_is_shared(plain: LlamaEngine) -> None:
    """As with models whose memory can only be copied whole."""
    done = plain.generate("t", TaskSpec(prompt="One? " * 40, n=4, max_tokens=5, temperature=1.0), Stop(60))
    assert done.after.prefilled - done.before.prefilled == done.prompt_tokens
    assert nothing_left(plain)


def test_pieces_of_each_answer_make_its_text(engine: LlamaEngine) -> None:
    pieces: list[Delta] = []
    spec = TaskSpec(prompt="Go on.", n=5, max_tokens=20, temperature=1.0, stop=("e",))
    done = engine.generate("t", spec, Stop(60), pieces.append)
    told = ["".join(p.text for p in pieces if p.index == i) for i in range(5)]
    assert told == [choice.text for choice in done.output.choices]
    assert {choice.finish_reason for choice in done.output.choices} <= {"stop", "length"}


def test_a_cancel_ends_all_answers_and_no_other_task(engine: LlamaEngine) -> None:
    stop, begun = Stop(120), threading.Event()
    with ThreadPoolExecutor() as pool:
        spec = TaskSpec(prompt="Go on.", n=7, max_tokens=1500, temperature=1.0, logit_bias=endless(engine))
        many = pool.submit(engine.generate, "many", spec, stop, lambda _: begun.set())
        assert begun.wait(60)
        other = pool.submit(engine.generate, "other", TaskSpec(prompt="Hi.", max_tokens=5), Stop(60))
        stop.cancel()
        done = many.result()
        assert other.result().completion_tokens > 0
    assert {choice.finish_reason for choice in done.output.choices} == {"cancelled"}
    assert done.finish == "cancelled"
    assert sum(choice.tokens == 0 for choice in done.output.choices) >= 7 - engine.slots  # those that waited
    assert nothing_left(engine)


def test_an_answer_cut_at_the_deadline_makes_it_the_task_s_end(engine: LlamaEngine) -> None:
    """Whatever the first one ended by."""
    bias = endless(engine)
    done = engine.generate("t", TaskSpec(prompt="Go on.", n=6, max_tokens=1500, logit_bias=bias), Stop(0.3))
    assert {choice.finish_reason for choice in done.output.choices} == {"deadline"}
    assert nothing_left(engine)
    first = done.output.model_copy(update={"finish_reason": "stop"})
    assert replace(done, output=first).finish == "deadline"


def test_a_task_of_many_answers_keeps_no_other_waiting(engine: LlamaEngine) -> None:
    """Twelve long answers wait for four slots: the next slot is the newcomer's."""
    ended: list[str] = []
    bias = endless(engine)

    def go(name: str, n: int, tokens: int) -> None:
        engine.generate(name, TaskSpec(prompt="Go on.", n=n, max_tokens=tokens, logit_bias=bias), Stop(120))
        ended.append(name)

    many = threading.Thread(target=go, args=("many", 12, 60))
    many.start()
    eventually(lambda: engine.counters().active == engine.slots, "all slots are taken")
    go("one", 1, 60)
    many.join()
    assert ended == ["one", "many"]


def test_the_failure_of_one_answer_is_the_task_s(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = engine._pool.batches
    real, calls = sampling.Sampler.sample, [0]

    def fail(self: sampling.Sampler, logits: Any, left: int) -> int:
        calls[0] += 1
        if calls[0] == 6:
            raise RuntimeError("something broke")
        return real(self, logits, left)

    monkeypatch.setattr(sampling.Sampler, "sample", fail)
    with pytest.raises(EngineError, match="something broke"):
        engine.generate("t", TaskSpec(prompt="Hi.", n=7, max_tokens=50, temperature=1.0), Stop(60))
    assert batch.busy is False
    assert nothing_left(engine)


def test_a_grammar_s_time_is_that_of_all_answers(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"prompt": "Hi.", "grammar": 'root ::= [a-z]+ "!"', "max_tokens": 4, "temperature": 1.0}
    done = engine.generate("t", TaskSpec(n=6, seed=1, **options), Stop(60))
    assert len({choice.text for choice in done.output.choices}) > 3
    assert all(re.fullmatch("[a-z]+!?", choice.text) for choice in done.output.choices)
    monkeypatch.setattr(sampling, "GRAMMAR_RATE", -sampling.GRAMMAR_BURST / 10)  # ten tokens, of whichever
    with pytest.raises(EngineError, match="takes too long"):
        engine.generate("t", TaskSpec(n=6, **options), Stop(60))
    assert nothing_left(engine)


# --- token ids, biases, gaps


def test_a_bias_decides_and_the_grammar_still_holds(engine: LlamaEngine) -> None:
    (batch,) = engine._pool.batches
    (a,), (b,) = (batch.model.tokenize(letter, special=False, add_bos=False) for letter in "ab")

    def said(**fields: Any) -> str:
        return engine.generate("t", TaskSpec(prompt="Hi.", max_tokens=3, **fields), Stop(60)).output.text

    for temperature in (0.0, 1.0):
        assert said(logit_bias={a: 100}, temperature=temperature) == "aaa"
        either = {"grammar": 'root ::= "a" | "b"', "temperature": temperature}
        assert said(logit_bias={b: 50}, **either) == "b"
        assert said(logit_bias={b: -100, a: -50}, **either) == "a"


def test_token_ids_are_taken_as_they_are(engine: LlamaEngine) -> None:
    (batch,) = engine._pool.batches
    ids = batch.model.tokenize("The sea is", special=False, add_bos=False)
    done = engine.generate("t", TaskSpec(prompt_ids=ids, max_tokens=3, n=2, echo=True), Stop(60))
    assert done.prompt_tokens == len(ids)
    assert all(choice.text.startswith("The sea is") for choice in done.output.choices)
    assert done.completion_tokens <= 6
    assert engine.generate("t", TaskSpec(prompt_ids=[batch.model.vocab_size - 1], max_tokens=1), Stop(60)).finish
    for field in ({"prompt_ids": [1, batch.model.vocab_size]}, {"prompt": "Hi.", "logit_bias": {2**31 - 1: 1.0}}):
        with pytest.raises(EngineError, match=r"there is no token \d+: the model has 49152") as caught:
            engine.generate("t", TaskSpec(**field), Stop(60))
        assert not caught.value.retry
    assert nothing_left(engine)


@settings(max_examples=12, deadline=None)
@given(ids=st.lists(st.integers(17, 49_151), min_size=1, max_size=120), n=st.integers(1, 5), top=st.integers(0, 2))
def test_an_echoed_prompt_has_its_log_probabilities(engine: LlamaEngine, ids: list[int], n: int, top: int) -> None:
    """As those of a text that was generated, whatever is cached and however it is cut into steps."""
    spec = TaskSpec(prompt_ids=ids, n=n, echo=True, logprobs=top, max_tokens=2, temperature=1.0, seed=4)
    done = engine.generate("t", spec, Stop(60))
    longer = engine.generate("t", spec.model_copy(update={"prompt_ids": (*ids, 17), "n": 1}), Stop(60))
    for choice in done.output.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(ids) + choice.tokens
        assert choice.logprobs[: len(ids)] == done.output.logprobs[: len(ids)]  # type: ignore[index]
        assert choice.logprobs[0]["logprob"] is None
        assert "".join(entry["token"] for entry in choice.logprobs) == choice.text or "\ufffd" in choice.text
    given_, again = done.output.logprobs or [], longer.output.logprobs or []
    assert [e["logprob"] for e in again[1 : len(ids)]] == pytest.approx(
        [e["logprob"] for e in given_[1 : len(ids)]], abs=1e-3
    )


def test_an_echo_without_log_probabilities_is_the_prompt(engine: LlamaEngine) -> None:
    pieces: list[Delta] = []
    spec = TaskSpec(prompt="Say a word: ", n=2, echo=True, max_tokens=3, temperature=1.0)
    done = engine.generate("t", spec, Stop(60), pieces.append)
    for i, choice in enumerate(done.output.choices):
        assert choice.text.startswith("Say a word: ")
        assert "".join(p.text for p in pieces if p.index == i) == choice.text
    with pytest.raises(EngineError, match="give the tokens as prompt_ids") as caught:
        engine.generate("t", TaskSpec(prompt="Hi.", echo=True, logprobs=1), Stop(60))
    assert not caught.value.retry


def test_a_gap_is_filled_where_the_model_was_taught_to(engine: LlamaEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="suffix: this model has no tokens to fill in with") as caught:
        engine.generate("t", TaskSpec(prompt="def f(", suffix="return x"), Stop(60))
    assert not caught.value.retry
    marks = [pair(f"tokenizer.ggml.fim_{which}_token_id", U32, 4 + i) for i, which in enumerate(("pre", "suf", "mid"))]
    model = Model(tiny_llama(tmp_path / "filling.gguf", more=marks))
    before, after = (model.tokenize(text, special=False, add_bos=False) for text in ("def f(", "return <|im_end|>"))
    asked = sampling.Prompter(model).prompt(TaskSpec(prompt="def f(", suffix="return <|im_end|>")).tokens
    assert asked == [4, *before, 5, *after, 6]
    assert model.eos not in asked  # what a user writes is text, whatever it looks like
    model.close()


# --- a full KV cache


@pytest.fixture(scope="module")
def cramped(tiny: Path) -> Iterator[LlamaEngine]:
    """An engine with 768 tokens of KV cache for four requests of up to 512."""
    memory = tiny.stat().st_size + SCRATCH + 768 * KV_BYTES
    one = started(tiny, context=512, model_memory=memory)
    assert one.offers()[0].kv_tokens == 768
    yield one
    one.close()


def test_a_full_cache_preempts_and_loses_nothing(cramped: LlamaEngine) -> None:
    before = cramped.counters()
    specs = [TaskSpec(prompt=f"Go on, {i}!", max_tokens=400, value=1 + i) for i in range(4)]
    done = all_of(cramped, specs)
    after = cramped.counters()
    assert [d.output.finish_reason for d in done if d.completion_tokens < 400] == [
        "stop" for d in done if d.completion_tokens < 400
    ]
    again = after.prefilled - before.prefilled - sum(d.prompt_tokens for d in done)
    assert again > 100  # what was preempted was prefilled anew
    assert (after.active, after.waiting, after.free_kv) == (0, 0, 768)


def test_more_answers_than_the_cache_holds_take_turns(cramped: LlamaEngine) -> None:
    """Each of three needs 300 of the 768 cells: one is put back, and goes on where it was."""
    before, pieces = cramped.counters(), list[Delta]()
    spec = TaskSpec(prompt="Go on!", n=3, max_tokens=300, temperature=1.0, logit_bias=endless(cramped))
    done = cramped.generate("t", spec, Stop(120), pieces.append)
    assert [(choice.tokens, choice.finish_reason) for choice in done.output.choices] == [(300, "length")] * 3
    assert cramped.counters().prefilled - before.prefilled > done.prompt_tokens + 100  # what was put back
    told = ["".join(p.text for p in pieces if p.index == i) for i in range(3)]
    assert told == [choice.text for choice in done.output.choices]
    assert nothing_left(cramped)


def test_many_answers_make_way_for_one(cramped: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's value is that of all its answers together, so per work many of them are worth less than one, however
    long that is."""
    put_back: list[str] = []
    leave = Batch._leave

    def watch(batch: Batch, answer: Answer) -> None:
        if not answer.over:
            put_back.append(answer.request.task_id)
        leave(batch, answer)

    monkeypatch.setattr(Batch, "_leave", watch)
    options: dict[str, Any] = {"prompt": "Go on!", "logit_bias": endless(cramped)}
    with ThreadPoolExecutor() as pool:
        many = pool.submit(cramped.generate, "many", TaskSpec(n=3, max_tokens=240, **options), Stop(120))
        eventually(lambda: cramped.progress().get("many", 0) > 60, "it is well inside")
        cramped.generate("one", TaskSpec(max_tokens=300, **options), Stop(120))
        many.result()
    assert set(put_back) == {"many"}
    assert nothing_left(cramped)


def test_the_least_valuable_waits(cramped: LlamaEngine) -> None:
    """Of two that cannot both fit, the one of low value is put back, and the other one ends first."""
    order: list[str] = []

    def go(name: str, value: float) -> None:
        cramped.generate(name, TaskSpec(prompt=f"Go on, {name}.", max_tokens=440, value=value), Stop(120))
        order.append(name)

    threads = [threading.Thread(target=go, args=a) for a in (("cheap", 1.0), ("dear", 100.0))]
    threads[0].start()
    eventually(lambda: "cheap" in cramped.progress(), "the cheap request is inside")
    threads[1].start()
    for thread in threads:
        thread.join()
    assert order == ["dear", "cheap"]


def test_what_cannot_fit_is_refused_with_its_numbers(cramped: LlamaEngine) -> None:
    with pytest.raises(
        EngineError, match=r"max_tokens 500 exceed the context of 512 tokens: lower max_tokens to 4\d\d"
    ):
        cramped.generate("t", TaskSpec(prompt="Hi.", max_tokens=500), Stop(60))


def test_an_answer_of_any_length_has_all_the_context(cramped: LlamaEngine) -> None:
    specs = [TaskSpec(prompt=f"Go on, {i}!", max_tokens=4096, fit_context=True) for i in range(4)]
    whole = [d for d in all_of(cramped, specs) if d.output.finish_reason == "length"]
    assert [d.prompt_tokens + d.completion_tokens for d in whole] == [512] * len(whole) != []
    with pytest.raises(EngineError, match=r"^prompt of 5\d\d tokens leaves no room in the context of 512 tokens"):
        cramped.generate("t", TaskSpec(prompt="word " * 500, max_tokens=4096, fit_context=True), Stop(60))


def test_a_decode_that_finds_no_cells_preempts(cramped: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp itself says that the cache is full: here because the count of free cells is made to be wrong."""
    (batch,) = cramped._pool.batches
    wrong = KVCells(10_000, cramped.slots)
    monkeypatch.setattr(batch, "_cells", wrong)
    monkeypatch.setattr(batch, "_prefixes", PrefixCache(range(4, 12), batch.context, wrong))
    batch.context.clear()
    done = all_of(cramped, [TaskSpec(prompt=f"Go on, {i}!", max_tokens=400) for i in range(4)])
    assert {d.output.finish_reason for d in done} <= {"length", "stop"}
    assert all(d.completion_tokens > 0 for d in done)
    # It learnt of 10,000 about the 768 there are: llama.cpp tells only that a group of n does not fit, which leaves
    # the count up to n - 1 too high (769 was seen).
    assert wrong.free + wrong.reusable < 1_000
    batch._begin()
    batch.context.clear()


@pytest.mark.parametrize("broken", ["decode", "logits", "copy"])
def test_the_engine_outlives_a_failure_inside(tiny: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    engine = started(tiny)
    (batch,) = engine._pool.batches
    calls = [0]
    real = getattr(batch.context, broken)

    def fail_now_and_then(*args: object) -> object:
        calls[0] += 1
        if calls[0] % 7 == 3:
            raise RuntimeError("something broke")
        return real(*args)

    monkeypatch.setattr(batch.context, broken, fail_now_and_then)
    outcomes = []
    try:
        for i in range(12):
            try:
                engine.generate("t", chat("Say little. " * 10, f"{i}", max_tokens=6), Stop(60))
                outcomes.append("done")
            except EngineError as error:
                outcomes.append("something broke" if error.retry and "something broke" in str(error) else str(error))
        monkeypatch.undo()
        assert set(outcomes) == {"done", "something broke"}
        assert engine.generate("t", TaskSpec(prompt="Hi.", max_tokens=3), Stop(60)).completion_tokens > 0
        assert batch.free_kv == batch.context.kv_tokens
        assert engine.counters().active == 0
    finally:
        engine.close()


def test_an_aborted_decode_leaves_nothing_half_done(tiny: Path) -> None:
    model = Model(tiny)
    context = Context(model, kv_tokens=512, sequences=2, batch=256, threads=1)

    def compute() -> int:
        context.begin()
        context.add(0, 0, list(range(100, 300)), output=True)
        context.add(1, 0, [7, 8, 9], output=True)
        return context.decode()

    assert compute() == OK
    wanted = context.logits(202).copy()
    context.clear()
    context.abort(True)
    assert compute() == ABORTED
    context.abort(False)
    assert compute() == OK  # the same positions again: they were given back
    assert (context.logits(202) == wanted).all()
    context.close()
    model.close()


def test_a_grammar_that_takes_too_long_is_not_let_again(engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "GRAMMAR_BURST", 0.0)
    monkeypatch.setattr(sampling, "GRAMMAR_RATE", 0.0)
    with pytest.raises(EngineError, match=r"grammar: finding what it allows takes too long: simplify it") as caught:
        engine.generate("t", TaskSpec(prompt="Hi.", grammar='root ::= "a"?'), Stop(60))
    assert not caught.value.retry


# --- variants


def test_variants_are_loaded_on_demand_within_the_memory(tiny: Path) -> None:
    memory = tiny.stat().st_size + 2 * SCRATCH  # one at a time
    engine = started(tiny, variants="f32,Q8_0,q4_0", model_memory=memory, slots=2)
    try:
        names = [offer.name for offer in engine.offers()]
        assert names == ["tiny:f32", "tiny:q8_0", "tiny:q4_0"]
        assert [v.name for v in engine._pool._all.values() if v.loaded] == ["tiny:f32"]
        for name in (names[2], names[0], names[1]):
            done = engine.generate("t", TaskSpec(prompt="Hi.", model=name, max_tokens=3), Stop(60))
            assert done.model == name
            assert [v.name for v in engine._pool._all.values() if v.loaded] == [name]
        mixed = all_of(engine, [TaskSpec(prompt="Hi.", model=names[i % 3], max_tokens=30) for i in range(9)])
        assert [d.model for d in mixed] == [names[i % 3] for i in range(9)]
        assert {d.completion_tokens for d in mixed} <= set(range(1, 31))
    finally:
        engine.close()


def test_a_request_stopped_while_it_waits_for_its_model(tiny: Path) -> None:
    engine = started(tiny, variants="f32,q8_0", model_memory=tiny.stat().st_size + 2 * SCRATCH, slots=2)
    try:
        stop, inside = Stop(120), threading.Event()
        with ThreadPoolExecutor() as pool:
            holder = pool.submit(
                engine.generate, "a", TaskSpec(prompt="Go on.", max_tokens=1900), stop, lambda _: inside.set()
            )
            inside.wait(60)
            done = engine.generate("b", TaskSpec(prompt="Hi.", model="tiny:q8_0"), Stop(0.01))
            stop.cancel()
            holder.result()
        assert (done.output.finish_reason, done.completion_tokens) == ("deadline", 0)
    finally:
        engine.close()


def test_processes_that_quantise_at_once_make_one_file(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from perllm.edge_worker.model_files import quantised; "
        "print(quantised(Path(sys.argv[1]), 'q8_0', Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(tiny), str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [child.communicate()[0] for child in children]
    (made,) = {text.strip().splitlines()[-1] for text in printed}
    assert sum(text.count("model_quantising") for text in printed) == 1  # the others waited
    assert read_gguf(Path(made)).quantisation == "q8_0"
    left = [path.name for path in Path(made).parent.iterdir() if path.suffix not in (".gguf", ".lock")]
    assert left == []


# --- any mix


def test_any_mix_of_requests_leaves_nothing_behind(tiny: Path) -> None:
    """Random requests, some cancelled, some past their deadline, some impossible, on a cramped cache: each ends as it
    should, every cell comes back, and the energy adds up."""
    memory = tiny.stat().st_size + SCRATCH + 768 * KV_BYTES
    engine = started(tiny, context=512, model_memory=memory, slots=6)
    rng = random.Random(11)
    systems = ["", "You are terse. " * 12, "You are kind. " * 12]
    outcomes: list[str] = []
    joules: list[float] = []

    def one(i: int) -> None:
        pick = random.Random(i)
        stop = Stop(pick.choice([0.0, 0.02, 60, 60, 60]))
        seen = [0]

        def listen(_: Delta) -> None:
            seen[0] += 1
            if seen[0] == cancel_at:
                stop.cancel()

        cancel_at = pick.choice([0, 0, 0, 1, 5])
        spec = chat(
            systems[i % 3] or "Hm.",
            "word " * pick.choice([1, 5, 50, 200, 900]),
            max_tokens=pick.choice([1, 10, 80, 200]),
            value=pick.choice([0.1, 1, 10]),
            temperature=pick.choice([0.0, 1.0]),
            stop=pick.choice([(), ("a", "e")]),
            grammar=pick.choice([None, None, None, 'root ::= [a-z]+ "!"', "root ::= ("]),
            n=pick.choice([1, 1, 1, 2, 9]),
        )
        try:
            done = engine.generate(f"t{i}", spec, stop, pick.choice([listen, None]))
        except EngineError as error:
            outcomes.append("failed" if error.retry else "refused")
        else:
            for choice in done.output.choices:
                assert choice.tokens <= spec.max_tokens
                assert choice.finish_reason != "length" or choice.tokens == spec.max_tokens
            assert len(done.output.choices) == spec.n
            outcomes.append(done.finish)
            joules.append(done.energy.total)

    try:
        numbers = list(range(110))
        rng.shuffle(numbers)
        with ThreadPoolExecutor(10) as pool:
            list(pool.map(one, numbers))
        assert set(outcomes) == {"refused", "stop", "length", "deadline", "cancelled"}
        assert nothing_left(engine)
        total = engine._energy.settle()
        assert sum(joules) + engine._energy.unattributed == pytest.approx(total, rel=0.01)
    finally:
        engine.close()


def test_closing_ends_what_runs(tiny: Path) -> None:
    engine = started(tiny)
    inside = threading.Event()
    with ThreadPoolExecutor() as pool:
        job = pool.submit(
            engine.generate, "t", TaskSpec(prompt="Go on.", max_tokens=1900), Stop(120), lambda _: inside.set()
        )
        inside.wait(60)
        engine.close()
        with pytest.raises(EngineError, match="closing") as caught:
            job.result()
    assert caught.value.retry
    assert not any(variant.loaded for variant in engine._pool._all.values())
    engine.close()
    with pytest.raises(EngineError, match="closing"):
        engine.generate("t", TaskSpec(prompt="Hi."), Stop(1))


# --- files llama.cpp cannot take


def refused(path: Path, **fields: Any) -> str:
    engine = LlamaEngine(EdgeSettings(model=str(path), threads=1, **fields))
    with pytest.raises(BadSetting) as caught:
        engine.start()
    engine.close()
    return str(caught.value)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    message = refused(tiny_llama(tmp_path / "m.gguf", architecture="martian"))
    assert "unknown model architecture: 'martian'" in message


def test_a_file_llama_cpp_would_die_of(tmp_path: Path) -> None:
    assert "llama.cpp crashes on" in refused(tiny_llama(tmp_path / "m.gguf", block_count=0))


def test_metadata_that_contradicts_the_tensors(tmp_path: Path) -> None:
    assert "blk.2.attn_norm.weight" in refused(tiny_llama(tmp_path / "m.gguf", block_count=3))


def test_a_truncated_file(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny.read_bytes()[:-1000])
    assert "cut short" in refused(path)


def test_more_than_the_memory(tiny: Path) -> None:
    message = refused(tiny, model_memory=100_000_000)
    assert "free may be used" in message
    assert "choose a smaller model or quantisation" in message


def test_more_context_than_the_model_has(tiny: Path) -> None:
    assert "trained for 2048 tokens: lower it" in refused(tiny, context=4096)


def test_an_unknown_quantisation(tiny: Path) -> None:
    assert "unknown quantisation 'q9_9': choose one of" in refused(tiny, variants="q9_9")
