"""The answers of one task in vLLM's hands, with a stand-in for vLLM: how it is asked, heard, stopped and believed. What
vLLM itself makes of it is in tests/gpu."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from perllm.broker.capabilities import Capability
from perllm.broker.engine.contract import EngineError, Stop
from perllm.broker.engine.energy import Attribution
from perllm.broker.engine.text import Prompt
from perllm.broker.messages import Delta, TaskSpec
from perllm.cloud_worker.event_loop import LoopThread
from perllm.cloud_worker.nvml import PowerLimitMeter
from perllm.cloud_worker.settings import CloudSettings
from perllm.cloud_worker.vllm_engine import VLLMEngine


class DeadError(Exception):
    pass


class GenerateError(Exception):
    pass


@dataclass
class StandIn:
    """Answers each request with one word per step, named for its place among a task's, until its tokens are all or it
    is aborted."""

    lengths: Sequence[int]  # of the answers, in the order they are asked for
    broken: int | None = None  # the answer that fails, after one word
    asked: list[str] = field(default_factory=list)
    aborted: set[str] = field(default_factory=set)
    errored: bool = False

    async def generate(self, prompt: Any, params: Any, key: str, **_: Any) -> AsyncIterator[Any]:
        mine = len(self.asked)
        self.asked.append(key)
        for step in range(self.lengths[mine]):
            await asyncio.sleep(0)
            if mine == self.broken and step:
                raise GenerateError
            over = step == self.lengths[mine] - 1
            reason = "abort" if key in self.aborted else "length" if over else None
            tokens = [] if reason == "abort" else [mine]
            text = f"{params}.{step} " if tokens else ""
            completion = SimpleNamespace(token_ids=tokens, text=text, logprobs=None, finish_reason=reason)
            yield SimpleNamespace(
                outputs=[completion],
                finished=reason is not None,
                num_cached_tokens=0,
                metrics=None,
                prompt_logprobs=None,
            )
            if reason is not None:
                return

    async def abort(self, key: str) -> None:
        self.aborted.add(key)


@pytest.fixture
def engine() -> Iterator[Callable[[StandIn], VLLMEngine]]:
    loops: list[LoopThread] = []

    def make(llm: StandIn) -> VLLMEngine:
        one = VLLMEngine(CloudSettings.model_validate({"model": "org/name"}))
        one._api = SimpleNamespace(
            sampling_params=lambda spec, *_: [f"p{i}" for i in range(spec.n)],
            tokens_input=list,
            EngineDeadError=DeadError,
            EngineGenerateError=GenerateError,
        )
        one._loras, one._capabilities = {}, (Capability.GENERATE,)
        one._prompter = SimpleNamespace(
            prompt=lambda _: Prompt([1, 2, 3]), answer=lambda *_: None, echo=lambda spec: "E:" if spec.echo else ""
        )
        one._limits = SimpleNamespace(context=10_000, kv_tokens=10_000, step_tokens=512)
        one._meter = PowerLimitMeter(idle=1.0, limit=2.0, busy=lambda: 0.0)
        one._energy = Attribution(one._meter)
        one._llm, one._loop = llm, LoopThread("test")
        loops.append(one._loop)
        return one

    yield make
    for loop in loops:
        loop.loop.call_soon_threadsafe(loop.loop.stop)


Make = Callable[[StandIn], VLLMEngine]


def test_answers_come_together_each_by_its_own_request(engine: Make) -> None:
    llm, pieces = StandIn([3, 1, 2]), list[Delta]()
    done = engine(llm).generate("t", TaskSpec(prompt="Hi.", n=3, echo=True), Stop(60), pieces.append)
    assert len(set(llm.asked)) == 3
    assert [choice.text for choice in done.output.choices] == ["E:p0.0 p0.1 p0.2 ", "E:p1.0 ", "E:p2.0 p2.1 "]
    assert [choice.tokens for choice in done.output.choices] == [3, 1, 2]
    assert (done.completion_tokens, done.prompt_tokens) == (6, 3)
    told = ["".join(p.text for p in pieces if p.index == i) for i in range(3)]
    assert told == [choice.text for choice in done.output.choices]


def test_a_cancel_aborts_every_answer_that_is_not_over(engine: Make) -> None:
    llm, stop = StandIn([1, 10**6, 10**6]), Stop(60)
    one = engine(llm)
    done = one.generate("t", TaskSpec(prompt="Hi.", n=3), stop, lambda p: stop.cancel() if p.index == 2 else None)
    assert [choice.finish_reason for choice in done.output.choices] == ["length", "cancelled", "cancelled"]
    assert done.finish == "cancelled"
    assert len(llm.aborted) == 2
    assert (one.progress(), one.counters().active, one.counters().waiting) == ({}, 0, 0)


def test_the_failure_of_one_ends_the_others(engine: Make) -> None:
    llm = StandIn([10**6, 10**6], broken=1)
    one = engine(llm)
    with pytest.raises(EngineError, match="vLLM failed") as caught:
        one.generate("t", TaskSpec(prompt="Hi.", n=2), Stop(60))
    assert caught.value.retry
    assert llm.aborted == {llm.asked[0]}
    assert one.progress() == {}
