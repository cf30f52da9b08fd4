"""A node whose answers a test writes: it takes tasks through the ledger as a worker does, and is its own scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from perllm.broker.capabilities import Capability
from perllm.broker.ledger import Dispatch, Ledger
from perllm.broker.messages import Delta, Output, State, TaskSpec
from perllm.broker.settings import Settings
from support.make import node_info, receipt, why

#: What is published of an answer while it is made, and the answer.
Script = Callable[[TaskSpec], tuple[Sequence[Delta], Output]]


class ScriptedNode:
    """Answers every task as the script says, one after the other, while the `with` lasts."""

    def __init__(self, url: str, script: Script) -> None:
        self._ledger = Ledger(Settings.model_validate({"redis_url": url, "lease": 300, "heartbeat": 60}))
        self._script, self._ended = script, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.seen: list[TaskSpec] = []

    def _run(self) -> None:
        everything = tuple(str(capability) for capability in Capability)
        info = node_info("n")
        offers = tuple(offer.model_copy(update={"capabilities": everything}) for offer in info.models)
        self._ledger.register(info.model_copy(update={"models": offers}))
        epoch = self._ledger.lead("script", 600)
        assert epoch is not None
        while not self._ended.wait(0.005):
            for task_id in self._ledger.ids(State.PENDING):
                self._answer(epoch, task_id)

    def _answer(self, epoch: int, task_id: str) -> None:
        dispatch = Dispatch(task_id, 1, "n", "boot-1", "emulated", "edge.n", "{}", why())
        if (
            self._ledger.dispatch(epoch, [dispatch]) != ["ok"]
            or (claim := self._ledger.claim(task_id, 1, "n", "token")) is None
        ):
            return  # cancelled meanwhile
        spec = TaskSpec.model_validate_json(claim.payload)
        self.seen.append(spec)
        pieces, output = self._script(spec)
        for piece in pieces:
            self._ledger.say(task_id, 1, "token", [piece])
        took = receipt("n").model_copy(update={"prompt_tokens": 7, "reasoning_tokens": 2 if output.reasoning else 0})
        self._ledger.complete(task_id, 1, "token", "succeeded", output, took)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._ledger.close()
