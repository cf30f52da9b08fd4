"""The edge engine with the real default model: what it generates, how it stops, what it counts and meters."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from perllm.broker.engine.contract import EngineError, Generation, Stop
from perllm.broker.messages import Delta, Message, TaskSpec
from perllm.edge_worker.engine import LlamaEngine
from perllm.edge_worker.settings import EdgeSettings

PROMPTS = [
    "What is the capital of France?",
    "List five fruits.",
    "def fibonacci(n):",
    "日本の首都はどこですか？",
    "Compose a limerick about a programmer. 😀",
    "Write one sentence about the sea.",
    "Continue this list of words: " + ", ".join(f"word {i}" for i in range(150)),  # longer than one chunk
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    """One engine for the module, without shared prefixes: those change rounding, and with it near ties."""
    settings = EdgeSettings(model_cache=tmp_path_factory.mktemp("models"), threads=1, slots=4)
    one = LlamaEngine(settings, cached_prompts=0)
    one.start()
    yield one
    one.close()


def run(engine: LlamaEngine, prompt: str, seconds: float = 120, **fields: Any) -> Generation:
    return engine.generate("t", TaskSpec(prompt=prompt, **fields), Stop(seconds))


# --- what it generates


def test_alone_it_equals_llama_cpps_own_greedy_output(engine: LlamaEngine) -> None:
    """Token for token: texts, counts and finish reasons of llama-cpp-python's `Llama`, with the same attention kernel
    and prompts cut into the same chunks."""
    from llama_cpp import Llama  # noqa: PLC0415

    (batch,) = engine._pool.batches
    path = engine._pool.get(None).gguf.path
    peer = Llama(
        str(path),
        n_ctx=2048,
        n_threads=1,
        n_threads_batch=1,
        n_batch=batch.tuning.chunk,
        flash_attn=True,
        verbose=False,
    )
    for prompt in PROMPTS:
        peer.reset()  # it would reuse the last prompt's beginning
        theirs: Any = peer.create_chat_completion(
            [{"role": "user", "content": prompt}], temperature=0, max_tokens=24, repeat_penalty=1.0
        )
        ours = run(engine, prompt, max_tokens=24)
        choice, usage = theirs["choices"][0], theirs["usage"]
        assert ours.output.text == choice["message"]["content"], prompt
        assert ours.prompt_tokens == usage["prompt_tokens"]
        assert ours.output.finish_reason == choice["finish_reason"]
        if "�" not in ours.output.text and prompt.isascii():  # Llama counts the tokens of a cut character twice
            assert ours.completion_tokens == usage["completion_tokens"]
    peer.close()


def test_messages_and_prompt_are_rendered_with_the_models_template(engine: LlamaEngine) -> None:
    one = run(engine, PROMPTS[0], max_tokens=8)
    spec = TaskSpec(messages=(Message(role="user", content=PROMPTS[0]),), max_tokens=8)
    two = engine.generate("t", spec, Stop(60))
    assert (one.prompt_tokens, one.output) == (two.prompt_tokens, two.output)
    system = TaskSpec(messages=(Message(role="system", content="Hi."), *(spec.messages or ())), max_tokens=8)
    three = engine.generate("t", system, Stop(60))
    assert three.prompt_tokens < one.prompt_tokens  # the template's own system prompt is longer


def test_max_tokens_is_exact(engine: LlamaEngine) -> None:
    for tokens in (1, 2, 7):
        done = run(engine, "Count to one hundred.", max_tokens=tokens)
        assert (done.completion_tokens, done.output.finish_reason) == (tokens, "length")


def test_stop_strings_end_the_text_before_them(engine: LlamaEngine) -> None:
    whole = run(engine, "List five fruits.", max_tokens=24).output.text
    stop = whole[7:12]  # across token borders
    done = run(engine, "List five fruits.", max_tokens=24, stop=(stop, "never comes"))
    assert done.output.text == whole[: whole.index(stop)]
    assert done.output.finish_reason == "stop"


def test_pieces_are_whole_characters_and_make_the_text(engine: LlamaEngine) -> None:
    pieces: list[Delta] = []
    spec = TaskSpec(prompt="日本の首都はどこですか？", max_tokens=24)
    done = engine.generate("t", spec, Stop(60), pieces.append)
    assert "".join(piece.text for piece in pieces) == done.output.text
    assert len(pieces) > 3
    assert all("�" not in piece.text and piece.text for piece in pieces)
    assert not done.output.text.isascii()


def test_a_failing_listener_ends_the_generation(engine: LlamaEngine) -> None:
    def broken(_: Delta) -> None:
        raise RuntimeError("no more, please")

    with pytest.raises(RuntimeError, match="no more, please"):
        engine.generate("t", TaskSpec(prompt="Count.", max_tokens=3000), Stop(60), broken)
    assert engine.counters().active == 0


def test_logprobs(engine: LlamaEngine) -> None:
    done = run(engine, PROMPTS[0], max_tokens=10, logprobs=3)
    assert done.output.logprobs is not None
    assert len(done.output.logprobs) == done.completion_tokens
    for entry in done.output.logprobs:
        top = [t["logprob"] for t in entry["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert entry["logprob"] == top[0] <= 0  # greedy takes the likeliest
    assert "".join(entry["token"] for entry in done.output.logprobs) == done.output.text
    assert run(engine, PROMPTS[0], max_tokens=2).output.logprobs is None
    assert len(run(engine, PROMPTS[0], max_tokens=2, logprobs=0).output.logprobs or ()) == 2


def test_a_json_schema_constrains_the_output(engine: LlamaEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    done = run(engine, "Describe a person.", max_tokens=120, json_schema=schema, temperature=0.7, seed=3)
    assert done.output.finish_reason == "stop"
    jsonschema.validate(json.loads(done.output.text), schema)


def test_a_grammar_constrains_the_output(engine: LlamaEngine) -> None:
    done = run(engine, "Is water wet?", max_tokens=10, grammar='root ::= "yes" | "no"')
    assert done.output.text in ("yes", "no")
    assert done.output.finish_reason == "stop"


def test_a_seed_makes_sampling_repeatable(engine: LlamaEngine) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 1.5, "top_p": 0.95, "top_k": 50, "min_p": 0.01}
    one, two = (run(engine, "Tell me a story.", seed=7, **options).output.text for _ in range(2))
    assert one == two
    others = {run(engine, "Tell me a story.", seed=seed, **options).output.text for seed in (8, 9)}
    assert others != {one}
    assert (
        run(engine, "Tell me a story.", **options).output.text != run(engine, "Tell me a story.", **options).output.text
    )  # without one it is random


def test_four_answers_are_those_of_their_seeds(engine: LlamaEngine) -> None:
    """Up to rounding, which in company differs, so that a near tie may fall the other way."""
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 1.0, "top_p": 0.9}
    before = engine.counters().prefilled
    done = run(engine, "Tell me a story.", n=4, seed=7, **options)
    assert engine.counters().prefilled - before == done.prompt_tokens  # once
    texts = [choice.text for choice in done.output.choices]
    alone = [run(engine, "Tell me a story.", seed=7 + i, **options).output.text for i in range(4)]
    assert sum(a == b for a, b in zip(texts, alone, strict=True)) >= 3
    assert len(set(texts)) == 4
    assert done.completion_tokens == sum(choice.tokens for choice in done.output.choices)
    assert done.energy.inference > 0


def test_at_temperature_0_all_answers_are_the_same(engine: LlamaEngine) -> None:
    done = run(engine, PROMPTS[1], n=3, max_tokens=8)
    assert len({choice.text for choice in done.output.choices}) == 1


def test_narrow_sampling_is_greedy(engine: LlamaEngine) -> None:
    greedy = run(engine, PROMPTS[5], max_tokens=12).output.text
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert run(engine, PROMPTS[5], max_tokens=12, temperature=2.0, **narrow).output.text == greedy


@pytest.mark.parametrize("penalty", [{"repeat_penalty": 1.5}, {"frequency_penalty": 1.5}, {"presence_penalty": 2.0}])
def test_penalties_act_on_what_was_generated(engine: LlamaEngine, penalty: dict[str, float]) -> None:
    prompt = "Repeat the word yes twenty times."

    def distinct(**options: float) -> float:
        words = run(engine, prompt, max_tokens=32, **options).output.text.split()
        return len(set(words)) / len(words)

    assert distinct(**penalty) > distinct()


# --- stopping


def test_cancel_ends_within_one_step_and_spares_the_others(engine: LlamaEngine) -> None:
    stop, running = Stop(120), threading.Event()
    at: list[int] = []

    def cancel(_: Delta) -> None:
        if not running.is_set():
            running.set()
            stop.cancel()
            at.append(engine.counters().steps)

    with ThreadPoolExecutor() as pool:
        other = pool.submit(run, engine, "Count to one hundred.", max_tokens=40)
        done = engine.generate("t", TaskSpec(prompt="Count.", max_tokens=3000), stop, cancel)
        assert done.output.finish_reason == "cancelled"
        assert done.after.steps - at[0] <= 1  # the one that had begun
        assert other.result().completion_tokens == 40
    assert engine.counters().free_kv == engine.offers()[0].kv_tokens


def test_the_deadline_ends_a_prefill(engine: LlamaEngine) -> None:
    long = " ".join(str(i) for i in range(1000))
    done = run(engine, long, seconds=0.15, max_tokens=5)
    assert (done.output.finish_reason, done.output.text, done.completion_tokens) == ("deadline", "", 0)
    assert done.after.prefilled - done.before.prefilled < done.prompt_tokens
    assert engine.counters().free_kv == engine.offers()[0].kv_tokens


def test_stopped_before_it_began(engine: LlamaEngine) -> None:
    stop = Stop()
    stop.cancel()
    done = engine.generate("t", TaskSpec(prompt="Count."), stop)
    assert (done.output.finish_reason, done.completion_tokens) == ("cancelled", 0)
    assert done.energy.inference == 0


# --- counting and metering


def test_a_run_of_many_is_counted_and_metered_exactly(engine: LlamaEngine) -> None:
    before, joules = engine.counters(), engine._energy.settle()
    unattributed = engine._energy.unattributed
    with ThreadPoolExecutor(10) as pool:
        jobs = [
            pool.submit(
                engine.generate,
                f"t{i}",
                TaskSpec(prompt=f"Say {i}.", max_tokens=5 + i, grammar='root ::= "yes"' if i > 7 else None),
                Stop(120),
            )
            for i in range(10)
        ]
        done = [job.result() for job in jobs]
    joules = engine._energy.settle() - joules
    after = engine.counters()
    assert all(d.completion_tokens == 5 + i for i, d in enumerate(done) if d.output.finish_reason == "length")
    ends = sum(d.output.finish_reason == "stop" for d in done)  # the token that ends a text is computed as well
    assert ends >= 2
    assert after.generated - before.generated == sum(d.completion_tokens for d in done) + ends
    assert after.prefilled - before.prefilled == sum(d.prompt_tokens for d in done)
    assert after.steps - before.steps < after.sequence_steps - before.sequence_steps  # they shared steps
    assert after.context_steps > before.context_steps
    assert (after.active, after.waiting, after.since_progress) == (0, 0, 0)
    assert after.free_kv == engine.offers()[0].kv_tokens
    assert 0 < after.longest_step < 60
    for d in done:
        assert before.steps <= d.before.steps < d.after.steps <= after.steps
        assert min(d.wait, d.prefill, d.decode) >= 0
    shares = sum(d.energy.total for d in done) + engine._energy.unattributed - unattributed
    assert shares == pytest.approx(joules, rel=0.01)
    assert {(d.energy.method, d.energy.estimated) for d in done} <= {("cpu-model", True), ("rapl", False)}


def test_progress_shows_what_is_inside(engine: LlamaEngine) -> None:
    seen: list[int] = []
    engine.generate(
        "mine", TaskSpec(prompt="Count.", max_tokens=12), Stop(60), lambda _: seen.append(engine.progress()["mine"])
    )
    assert seen == sorted(seen)
    assert seen[-1] > 5
    assert engine.progress() == {}


def test_the_calibration_is_of_this_machine(engine: LlamaEngine) -> None:
    (offer,) = engine.offers()
    assert offer.name == "smollm2-135m-instruct:q8_0"
    assert 1e-4 < offer.calibration.step + offer.calibration.sequence < 1
    assert 1e-5 < offer.calibration.prefill < 0.1
    assert engine.power().method in ("cpu-model", "rapl")


# --- bad input


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": "many words " * 3000}, r"prompt of \d+ tokens and max_tokens 4 exceed the context of 4096 tokens"),
        ({"max_tokens": 4090}, r"lower max_tokens to 40\d\d"),
        ({"grammar": "root ::= ("}, r"grammar: expecting '\)'"),
        ({"grammar": 'other ::= "a"'}, "grammar: .*root"),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar: .*nested deeper than"),
        ({"grammar": 'root ::= root "a"'}, "grammar: .*no text fits it"),
        ({"grammar": "\0"}, "grammar: line 1, column 1"),
        ({"grammar": "root ::= <[99999999]>"}, "grammar: .*tokens cannot be named"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema: cannot be used"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema: cannot be used"),
        ({"json_schema": {"type": "no such type"}}, "json_schema: cannot be used"),
        ({"model": "gpt-9"}, "model: 'gpt-9' is not served here, only smollm2"),
    ],
)
def test_what_can_never_run_is_refused_with_its_reason(
    engine: LlamaEngine, fields: dict[str, Any], complaint: str
) -> None:
    spec = TaskSpec(**{"prompt": "Hello.", "max_tokens": 4} | fields)
    with pytest.raises(EngineError, match=complaint) as caught:
        engine.generate("t", spec, Stop(60))
    assert not caught.value.retry
    assert run(engine, "Hello.", max_tokens=2).completion_tokens == 2  # the others are served


def test_a_second_engine_claims_no_more_cores_than_there_are(engine: LlamaEngine, tmp_path: Path) -> None:
    settings = EdgeSettings(model_cache=tmp_path)
    assert LlamaEngine(settings)._threads() == 1  # whatever is left beside the first one's, at least one
