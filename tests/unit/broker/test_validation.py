"""Task validation: what a task must be beside well-formed, given the settings and the nodes there are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.make import node_info
from support.raw import redis_of

from perllm.broker import validation
from perllm.broker.errors import InvalidTask
from perllm.broker.ledger import Ledger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import MAX_DEADLINE, NodeInfo
from perllm.broker.settings import Settings
from perllm.broker.validation import TaskValidator
from perllm.scheduler import examples


@pytest.fixture
def ledger(valkey: EmbeddedServer) -> Iterator[Ledger]:
    one = Ledger(Settings(redis_url=valkey.url, lease=300))
    redis_of(one).flushall()
    yield one
    one.close()


@pytest.fixture
def validator(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> TaskValidator:
    monkeypatch.setattr(validation, "OFFERS_AGE", -1.0)  # looks anew each time
    return TaskValidator(Settings(max_prompt_bytes=100), ledger)


def test_a_good_task(validator: TaskValidator) -> None:
    spec = validator.accept({"prompt": "hi", "deadline": 5})
    assert (spec.prompt, spec.deadline, spec.max_tokens) == ("hi", 5.0, 4096)


@pytest.mark.parametrize(
    ("task", "field"),
    [
        ({"prompt": "x" * 101}, "prompt"),
        ({"prompt": "ü" * 51}, "prompt"),  # bytes, not characters
        ({"messages": [{"role": "user", "content": "x" * 60}] * 2}, "messages"),
    ],
)
def test_an_oversized_prompt(validator: TaskValidator, task: dict[str, object], field: str) -> None:
    with pytest.raises(
        InvalidTask, match=rf"^{field}: 1\d\d bytes; the limit is 100 bytes \(PERLLM_MAX_PROMPT_BYTES\)$"
    ):
        validator.accept(task)


def test_the_largest_prompt(validator: TaskValidator) -> None:
    assert validator.accept({"prompt": "x" * 100}).text_bytes() == 100


def test_embeddings_are_by_one_model_and_no_larger_than_may_be_stored(ledger: Ledger, validator: TaskValidator) -> None:
    embed = {"kind": "embed", "inputs": ["a"]}
    assert validator.accept(embed).model is None  # no nodes: it waits for one
    can = {"capabilities": ("embeddings", "tokens"), "dimensions": 100, "context": 10}
    node = node_info("n")
    (offer,) = node.models
    ledger.register(node.model_copy(update={"models": (offer, offer.model_copy(update={"name": "e", **can}))}))
    assert validator.accept(embed).model == "e"
    for wrong, said in (
        ({"dimensions": 101}, "^dimensions: 101 is more than the model's embeddings have, 100$"),
        ({"inputs": [], "input_ids": [[1], [1] * 11]}, "^input_ids: input 1 has 11 tokens; the model takes 10"),
        ({"model": offer.name}, "^embeddings: "),
    ):
        with pytest.raises(InvalidTask, match=said):
            validator.accept({**embed, **wrong})
    small = TaskValidator(Settings(max_result_bytes=2048), ledger)
    assert small.accept({**embed, "inputs": ["a"] * 3}).model == "e"
    with pytest.raises(InvalidTask, match=r"^inputs: their 4 embeddings .*\(PERLLM_MAX_RESULT_BYTES\): give at most 3"):
        small.accept({**embed, "inputs": ["a"] * 4})
    small.accept({**embed, "inputs": ["a"] * 4, "dimensions": 90})
    other = node_info("o").models[0].model_copy(update={"name": "f", **can})
    ledger.register(node_info("o").model_copy(update={"models": (other,)}))
    with pytest.raises(InvalidTask, match=r"^model: name one of e, f: their embeddings do not compare$"):
        validator.accept(embed)


def test_a_model_nobody_serves(validator: TaskValidator, ledger: Ledger) -> None:
    validator.accept({"prompt": "x", "model": "later"})  # no nodes: it waits for one
    ledger.register(node_info("n"))
    with pytest.raises(InvalidTask, match=r"^model: no live node serves 'later'; on offer: emulated$"):
        validator.accept({"prompt": "x", "model": "later"})
    assert validator.accept({"prompt": "x", "model": "emulated"}).model == "emulated"


def test_more_tokens_than_any_context(validator: TaskValidator, ledger: Ledger) -> None:
    validator.accept({"prompt": "x", "max_tokens": 5000})
    ledger.register(node_info("n"))
    for model in ({}, {"model": "emulated"}):
        with pytest.raises(InvalidTask, match=r"^max_tokens: 4096 leaves no room in the largest context, 4096 tokens$"):
            validator.accept({"prompt": "x", "max_tokens": 4096} | model)
    validator.accept({"prompt": "x", "max_tokens": 4095})


def test_the_offers_are_not_looked_up_for_every_task(
    validator: TaskValidator, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "OFFERS_AGE", 60.0)
    validator.accept({"prompt": "x"})
    before = redis_of(ledger).info("stats")["total_commands_processed"]
    for _ in range(100):
        validator.accept({"prompt": "x"})
    assert redis_of(ledger).info("stats")["total_commands_processed"] - before < 5


def test_the_usual_deadline_of_a_task_that_starts_later_counts_from_there(validator: TaskValidator) -> None:
    assert validator.accept({"prompt": "hi", "start_after": 600}).deadline == 660
    assert validator.accept({"prompt": "hi", "start_after": MAX_DEADLINE - 1}).deadline == MAX_DEADLINE
    with pytest.raises(InvalidTask, match=r"start_after, 600 s, is not before its deadline, 20 s"):
        validator.accept({"prompt": "hi", "start_after": 600, "deadline": 20})


def able(name: str, model: str, *capabilities: str) -> NodeInfo:
    return examples.node_info(name, models=(model,), capabilities=capabilities)


def test_what_no_live_node_can_do(validator: TaskValidator, ledger: Ledger) -> None:
    tools = {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}]}
    validator.accept(tools)  # no nodes: it waits for one
    ledger.register(able("plain", "small", "generate", "chat"))
    with pytest.raises(InvalidTask, match=r"^tools: no node has offered it; start one whose model can "):
        validator.accept(tools)
    ledger.register(able("smith", "qwen2.5-7b", "generate", "chat", "tools"))
    assert validator.accept(tools).model is None
    with pytest.raises(InvalidTask, match=r"^tools: small does not offer it, but qwen2\.5-7b does$"):
        validator.accept(tools | {"model": "small"})
    for leave in (ledger.drain, ledger.leave):
        leave("smith", "smith.1", "stopping")
        with pytest.raises(InvalidTask, match=r"^tools: offered by qwen2\.5-7b; no live node serves it$"):
            validator.accept(tools)
    ledger.register(able("smith", "qwen2.5-7b", "generate", "chat", "tools"))
    validator.accept(tools)
    assert ledger.gone() == []


def test_what_no_single_model_can_do(validator: TaskValidator, ledger: Ledger) -> None:
    ledger.register(able("a", "one", "generate", "logprobs"))
    ledger.register(able("b", "two", "generate", "grammar"))
    with pytest.raises(
        InvalidTask, match=r"^generate, grammar, logprobs: no live node's model can do all of these at on"
    ):
        validator.accept({"prompt": "x", "logprobs": 1, "grammar": 'root ::= "a"'})


def test_a_model_whose_nodes_drain_is_waited_for(validator: TaskValidator, ledger: Ledger) -> None:
    ledger.register(able("a", "one", "generate"))
    ledger.register(able("b", "two", "generate"))
    ledger.drain("b", "b.1", "engine died")
    assert validator.accept({"prompt": "x", "model": "two"}).model == "two"


def test_without_max_tokens_the_setting_the_context_and_the_deadline_bound_the_answer(
    validator: TaskValidator, ledger: Ledger
) -> None:
    ledger.register(node_info("n"))
    assert validator.accept({"prompt": "x", "max_tokens": 7}).fit_context is False
    spec = validator.accept({"prompt": "x"})
    assert (spec.max_tokens, spec.fit_context) == (4096, True)  # as much as the whole context, which is no error
    with pytest.raises(InvalidTask, match=r"^max_tokens: 4096 leaves no room"):
        validator.accept({"prompt": "x", "fit_context": False})
