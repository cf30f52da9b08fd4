"""The vLLM engine on a real model: text, batching, stopping, priorities, energy, and its return from the dead."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.wait import eventually

from perllm.broker.engine.contract import EngineDown, EngineError, Generation, Stop
from perllm.broker.errors import BadSetting
from perllm.broker.messages import Delta, Message, TaskSpec
from perllm.broker.vectors import unpack
from perllm.cloud_worker.nvml import PowerLimitMeter
from perllm.cloud_worker.settings import CloudSettings
from perllm.cloud_worker.vllm_engine import VLLMEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ON_CPU = bool(os.environ.get("VLLM_TESTS_ON_CPU"))
SLOTS = 4


def make(model: Path | str, args: dict[str, Any], **more: Any) -> VLLMEngine:
    given = {"engine": "vllm", "model": str(model), "slots": SLOTS, "context": 512, "vllm_args": args, **more}
    meter = PowerLimitMeter(idle=5, limit=15, busy=time.process_time) if ON_CPU else None
    return VLLMEngine(CloudSettings.model_validate(given), meter=meter)


@pytest.fixture(scope="module")
def engine(smollm2: Path, small: dict[str, Any]) -> Iterator[VLLMEngine]:
    engine = make(smollm2, small, model_name="smollm2")
    engine.start()
    yield engine
    engine.close()
    engine.close()  # harmless


def spec(prompt: str = "Name three colours.", tokens: int = 16, **more: Any) -> TaskSpec:
    return TaskSpec.model_validate({"prompt": prompt, "max_tokens": tokens, **more})


def test_it_says_what_it_is_and_how_fast(engine: VLLMEngine) -> None:
    (offer,) = engine.offers()
    assert (offer.name, offer.context) == ("smollm2", 512)
    assert offer.kv_tokens >= 512
    assert offer.calibration.step > 0
    assert offer.calibration.prefill > 0
    assert "0.25" in engine.description
    assert "ms per token" in engine.power().method


def test_text_is_generated_and_streamed(engine: VLLMEngine) -> None:
    pieces: list[Delta] = []
    done = engine.generate("a", spec("What is the capital of France?", 24), Stop(60), pieces.append)
    assert "Paris" in done.output.text
    assert "".join(piece.text for piece in pieces) == done.output.text
    assert done.prompt_tokens > 10
    assert 0 < done.completion_tokens <= 24
    assert done.prefill > 0
    assert done.decode > 0
    assert done.after.generated - done.before.generated == done.completion_tokens
    assert done.after.steps > done.before.steps


def test_several_answers_share_their_prompt(engine: VLLMEngine) -> None:
    """More than the slots, and at temperature 0 too, which vLLM's own `n` refuses."""
    one = spec("Tell me a story about a river. " * 8, 12, temperature=1.0, seed=5)
    pieces: list[Delta] = []
    done = engine.generate("a", one.model_copy(update={"n": SLOTS + 2}), Stop(120), pieces.append)
    assert len({choice.text for choice in done.output.choices}) > SLOTS
    assert done.completion_tokens == sum(choice.tokens for choice in done.output.choices)
    told = ["".join(p.text for p in pieces if p.index == i) for i in range(SLOTS + 2)]
    assert told == [choice.text for choice in done.output.choices]
    third = engine.generate("b", one.model_copy(update={"seed": 7}), Stop(120))
    assert third.output.text[:8] == done.output.choices[2].text[:8]
    greedy = engine.generate("c", spec("Name three colours.", 8, n=3), Stop(120))
    assert len({choice.text for choice in greedy.output.choices}) == 1
    assert engine.progress() == {}


def test_a_cancel_ends_all_answers(engine: VLLMEngine) -> None:
    stop = Stop(300)
    done = engine.generate("a", spec("Write a very long story.", 450, n=3), stop, lambda _: stop.cancel())
    assert {choice.finish_reason for choice in done.output.choices} == {"cancelled"}
    assert (engine.progress(), engine.counters().active) == ({}, 0)


def test_token_ids_biases_and_an_echo(engine: VLLMEngine) -> None:
    tokenizer = engine._prompter._tokenizer
    ids = tokenizer.encode("The capital of France is", add_special_tokens=False)
    done = engine.generate("a", TaskSpec(prompt_ids=ids, echo=True, logprobs=1, max_tokens=2, n=2), Stop(60))
    for choice in done.output.choices:
        assert choice.text.startswith("The capital of France is")
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(ids) + choice.tokens
        assert choice.logprobs[0]["logprob"] is None
    (paris,) = tokenizer.encode(" Paris", add_special_tokens=False)
    for bias, said in ((100, True), (-100, False)):
        told = engine.generate("a", TaskSpec(prompt_ids=ids, max_tokens=1, logit_bias={paris: bias}), Stop(60))
        assert (told.output.text == " Paris") == said
    for field in ({"prompt_ids": [10**9]}, {"prompt": "Hi.", "suffix": "!"}):
        with pytest.raises(EngineError) as caught:
            engine.generate("a", TaskSpec(**field), Stop(60))
        assert not caught.value.retry


def test_the_chat_template_is_used(engine: VLLMEngine) -> None:
    turn = Message(role="user", content="What is the capital of France?")
    chat = TaskSpec(messages=(turn,), max_tokens=8)
    assert (
        engine.generate("a", chat, Stop(60)).output.text
        == engine.generate("b", spec(turn.content, 8), Stop(60)).output.text
    )


def test_the_same_seed_gives_the_same_text(engine: VLLMEngine) -> None:
    texts = {engine.generate(str(i), spec(tokens=12, temperature=1.0, seed=7), Stop(60)).output.text for i in range(2)}
    assert len(texts) == 1


def test_a_stop_string_ends_the_text_before_it(engine: VLLMEngine) -> None:
    whole = engine.generate("a", spec(tokens=24), Stop(60)).output.text
    stop = whole[len(whole) // 2 :][:3]
    done = engine.generate("b", spec(tokens=24, stop=[stop]), Stop(60))
    assert done.output.text == whole[: whole.index(stop)]
    assert done.output.finish_reason == "stop"


def test_log_probabilities_are_the_openai_api_s(engine: VLLMEngine) -> None:
    done = engine.generate("a", spec(tokens=5, logprobs=3), Stop(60))
    assert done.output.logprobs is not None
    assert len(done.output.logprobs) == done.completion_tokens
    for entry in done.output.logprobs:
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == max(e["logprob"] for e in entry["top_logprobs"])
    assert "".join(e["token"] for e in done.output.logprobs).startswith(done.output.text[:3])


def test_a_json_schema_is_kept_to(engine: VLLMEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    done = engine.generate("a", spec("Pick a number.", 40, json_schema=schema), Stop(60))
    assert json.loads(done.output.text)["n"] in (1, 2, 3)


def test_a_grammar_is_kept_to(engine: VLLMEngine) -> None:
    done = engine.generate("a", spec("Yes or no?", 8, grammar='root ::= "yes" | "no"'), Stop(60))
    assert done.output.text in ("yes", "no")


@pytest.mark.parametrize(
    "bad",
    [
        {"grammar": "root ::= ((("},
        {"json_schema": {"type": "no such type"}},
        {"tokens": 600},
        {"prompt": "word " * 600},
        {"model": "another"},
    ],
)
def test_what_cannot_be_served_is_refused_for_good(engine: VLLMEngine, bad: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        engine.generate("a", spec(**bad), Stop(60))
    assert not caught.value.retry
    assert engine.progress() == {}
    assert engine.generate("b", spec(tokens=2), Stop(60)).completion_tokens == 2  # it is none the worse for it


def test_a_shared_beginning_is_computed_once(engine: VLLMEngine) -> None:
    start = "The quick brown fox jumps over the lazy dog, and then it rests. " * 16
    engine.generate("a", spec(start + "Why?", 2), Stop(60))
    assert engine.generate("b", spec(start + "When?", 2), Stop(60)).cached_tokens > 100


def run_all(engine: VLLMEngine, specs: list[TaskSpec]) -> list[Generation]:
    with ThreadPoolExecutor(len(specs)) as pool:
        runs = [pool.submit(engine.generate, f"t{i}", one, Stop(300)) for i, one in enumerate(specs)]
        return [run.result() for run in runs]


def test_requests_share_a_batch_and_the_counters_add_up(engine: VLLMEngine) -> None:
    before = engine.counters()
    done = run_all(engine, [spec(f"Tell me about the number {i}.", 32) for i in range(3 * SLOTS)])
    after = engine.counters()
    tokens = sum(one.completion_tokens for one in done)
    assert after.generated - before.generated == tokens
    assert after.prefilled - before.prefilled == sum(one.prompt_tokens - one.cached_tokens for one in done)
    assert tokens / SLOTS <= after.steps - before.steps < tokens  # batched, and no wider than the slots
    assert after.sequence_steps - before.sequence_steps == pytest.approx(tokens, rel=0.1)
    assert after.busy > before.busy
    assert (after.active, after.waiting) == (0, 0)


def long_ones(engine: VLLMEngine, pool: ThreadPoolExecutor, count: int) -> dict[str, tuple[Stop, Any]]:
    """So many endless requests, all generating or in line."""
    stops = {f"long{i}": Stop(300) for i in range(count)}
    endless = spec("Write a very long story about the sea.", 450)
    runs = {name: (stop, pool.submit(engine.generate, name, endless, stop)) for name, stop in stops.items()}
    eventually(lambda: sum(n > 2 for n in engine.progress().values()) == min(count, SLOTS), "they run")
    return runs


def test_a_cancel_ends_a_running_request_and_no_other(engine: VLLMEngine) -> None:
    with ThreadPoolExecutor(2 * SLOTS) as pool:
        runs = long_ones(engine, pool, SLOTS)
        stop, run = runs.pop("long1")
        stop.cancel()
        done = run.result()
        assert done.output.finish_reason == "cancelled"
        assert 2 < done.completion_tokens < 450
        assert set(engine.progress()) >= set(runs)
        for stop, _ in runs.values():
            stop.cancel()
        assert {run.result().output.finish_reason for _, run in runs.values()} == {"cancelled"}
    assert engine.counters().active == 0


def test_a_cancel_ends_a_waiting_request(engine: VLLMEngine) -> None:
    with ThreadPoolExecutor(2 * SLOTS) as pool:
        runs = long_ones(engine, pool, SLOTS)
        stop = Stop(300)
        waiting = pool.submit(engine.generate, "waiting", spec(), stop)
        eventually(lambda: engine.counters().waiting == 1, "it waits")
        stop.cancel()
        done = waiting.result()
        assert (done.output.finish_reason, done.completion_tokens) == ("cancelled", 0)
        for stop, _ in runs.values():
            stop.cancel()


def test_a_deadline_cuts(engine: VLLMEngine) -> None:
    done = engine.generate("a", spec("Write a very long story.", 450), Stop(0.3))
    assert done.output.finish_reason == "deadline"
    assert done.completion_tokens < 450


def test_the_urgent_go_first(engine: VLLMEngine) -> None:
    ended: list[str] = []

    def run(name: str, stop: Stop, value: float) -> None:
        engine.generate(name, spec(tokens=4, value=value), stop)
        ended.append(name)

    with ThreadPoolExecutor(2 * SLOTS) as pool:
        runs = long_ones(engine, pool, SLOTS)
        order = [("relaxed", Stop(3000), 1.0), ("urgent", Stop(100), 1.0), ("precious", Stop(200), 100.0)]
        for number, (name, stop, value) in enumerate(order, start=1):
            pool.submit(run, name, stop, value)
            eventually(lambda n=number: engine.counters().waiting == n, "it waits")  # type: ignore[misc]
        next(iter(runs.values()))[0].cancel()  # one slot becomes free
        eventually(lambda: len(ended) == 3, "all three ended")
        for stop, _ in runs.values():
            stop.cancel()
    assert ended == ["precious", "urgent", "relaxed"]


def test_text_that_cannot_be_passed_on_ends_the_request(engine: VLLMEngine) -> None:
    def fail(_: Delta) -> None:
        raise ConnectionError("the reader is gone")

    with pytest.raises(ConnectionError):
        engine.generate("a", spec("Write a very long story.", 450), Stop(300), fail)
    assert engine.progress() == {}


@pytest.mark.usefixtures("nvml")
def test_shares_of_the_joules_sum_to_the_counter(engine: VLLMEngine) -> None:
    def joules() -> float:
        return engine.counters().energy

    tasks = [spec(f"Tell me all about the number {i}.", 400) for i in range(12 * SLOTS)]
    began, before = time.monotonic(), joules()
    done = run_all(engine, tasks)
    counted, seconds = joules() - before, time.monotonic() - began
    shares = sum(one.energy.inference + one.energy.idle for one in done)
    lag = 0.1 * 700 / max(counted, 1.0)  # the counter is up to 0.1 s behind, at either end
    assert shares == pytest.approx(counted, rel=0.01 + 2 * lag), f"in {seconds:.1f} s"
    assert not done[0].energy.estimated
    assert done[0].energy.method.startswith("nvml")


# --- engines of their own


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    from benchmarks.random_llama import write_model  # noqa: PLC0415

    return write_model(tmp_path / "tiny", "tiny")


@pytest.fixture
def started() -> Iterator[Callable[[VLLMEngine], VLLMEngine]]:
    engines: list[VLLMEngine] = []

    def start(engine: VLLMEngine) -> VLLMEngine:
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


Start = Callable[[VLLMEngine], VLLMEngine]


def engine_process() -> psutil.Process:
    found = [c for c in psutil.Process().children(recursive=True) if c.name().startswith("VLLM::Eng")]
    return max(found, key=lambda process: process.create_time())


def test_a_killed_engine_hands_everything_back_and_returns(tiny: Path, small: dict[str, Any], started: Start) -> None:
    engine = started(make(tiny, {"load_format": "dummy", **small}, slots=16, context=4096))
    seen: list[EngineDown] = []

    def run(name: str) -> None:
        try:
            engine.generate(name, spec(tokens=4000), Stop(300))
        except EngineDown as error:
            seen.append(error)

    threads = [threading.Thread(target=run, args=(f"t{i}",)) for i in range(16)]
    for thread in threads:
        thread.start()
    eventually(lambda: sum(n > 2 for n in engine.progress().values()) == 16, "all run")
    engine_process().kill()
    for thread in threads:
        thread.join()
    assert [error.inside for error in seen] == [True] * 16
    assert engine.progress() == {}
    with pytest.raises(EngineDown):
        engine.counters()
    with pytest.raises(EngineDown) as caught:
        engine.generate("while it is away", spec(), Stop(300))
    assert not caught.value.inside

    def back() -> bool:
        try:
            return engine.counters().active == 0
        except EngineDown:
            return False

    eventually(back, "the engine is back", patience=600)
    assert engine.generate("again", spec(tokens=8), Stop(300)).completion_tokens == 8


def test_an_engine_that_dies_while_idle_is_noticed(tiny: Path, small: dict[str, Any], started: Start) -> None:
    engine = started(make(tiny, {"load_format": "dummy", **small}))

    def down() -> bool:
        try:
            engine.counters()
        except EngineDown:
            return True
        return False

    engine_process().kill()
    eventually(down, "it is noticed")


def test_adapters_are_offered_and_change_the_text(
    smollm2: Path, small: dict[str, Any], tmp_path: Path, started: Start
) -> None:
    folder = write_adapter(tmp_path / "loud", json.loads((smollm2 / "config.json").read_text()))
    engine = started(make(smollm2, small, model_name="smollm2", adapters={"loud": str(folder)}))
    assert [offer.name for offer in engine.offers()] == ["smollm2", "smollm2:loud"]
    plain = engine.generate("a", spec(tokens=12, model="smollm2"), Stop(300))
    loud = engine.generate("b", spec(tokens=12, model="smollm2:loud"), Stop(300))
    assert (plain.model, loud.model) == ("smollm2", "smollm2:loud")
    assert plain.output.text != loud.output.text


def write_adapter(folder: Path, config: dict[str, Any]) -> Path:
    """A LoRA adapter of random weights on the query projections, strong enough to be noticed."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    folder.mkdir()
    rank, hidden = 8, config["hidden_size"]
    width = config["num_attention_heads"] * config["head_dim"]
    torch.manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden, dtype=torch.bfloat16)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, rank, dtype=torch.bfloat16)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 64, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"task_type": "CAUSAL_LM"}))
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "/no/such/folder"}, "PERLLM_MODEL: there is no folder"),
        ({"model": "."}, r"holds no config\.json"),
        ({"vllm_args": {"load_fromat": "dummy"}}, "PERLLM_VLLM_ARGS: load_fromat"),
        ({"adapters": {"a": "/no/such/adapter"}}, "PERLLM_ADAPTERS: a: "),
        ({"context": 1_000_000}, "vLLM cannot serve PERLLM_MODEL"),
    ],
)
def test_what_cannot_be_started_is_one_clear_error(
    tiny: Path,
    small: dict[str, Any],
    given: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = {"model": str(tiny), "args": {"load_format": "dummy", **small}}
    args = given.pop("vllm_args", usual["args"])
    engine = make(given.pop("model", usual["model"]), args, **given)
    with pytest.raises(BadSetting, match=message):
        engine.start()
    engine.close()


# --- embedding


def test_inputs_of_a_task_are_embedded_side_by_side(smollm2: Path, small: dict[str, Any]) -> None:
    engine = make(smollm2, {**small, "runner": "pooling"}, model_name="embedder")
    engine.start()
    try:
        (offer,) = engine.offers()
        assert offer.capabilities == ("embeddings", "tokens")
        texts = [f"text number {number}" for number in range(50)]
        done = engine.generate("a", TaskSpec(kind="embed", inputs=tuple(texts)), Stop(60))
        assert done.output.vectors is not None
        vectors = [unpack(vector) for vector in done.output.vectors]
        assert [len(vector) for vector in vectors] == [offer.dimensions] * 50
        alone = engine.generate("b", TaskSpec(kind="embed", inputs=(texts[7],)), Stop(60))
        assert alone.output.vectors is not None
        assert sum(a * b for a, b in zip(vectors[7], unpack(alone.output.vectors[0]), strict=True)) > 0.99
        assert done.prompt_tokens > alone.prompt_tokens > 0
        assert done.energy.inference > 0
        with pytest.raises(EngineError, match="input 1 has"):
            engine.generate("c", TaskSpec(kind="embed", inputs=("a", "word " * 600)), Stop(60))
        stop = Stop(60)
        stop.cancel()
        assert engine.generate("d", TaskSpec(kind="embed", inputs=tuple(texts)), stop).output.vectors is None
    finally:
        engine.close()
