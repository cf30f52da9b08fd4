"""The protocol cannot lose, double or strand a task, by exhaustion; built wrong, it does and is caught; and the ledger
there is does, step by step, what the model says."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from model.explore import explore
from model.protocol import BROKEN, Ledger, start
from model.replay import Stage, walk
from perllm.broker.ledger import Ledger as RealLedger
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.settings import Settings


@pytest.mark.parametrize(("tasks", "faults", "at_least"), [(2, 2, 200_000), (1, 3, 90_000)])
def test_every_order_of_events_ends_well(tasks: int, faults: int, at_least: int) -> None:
    report = explore(start(tasks, nodes=2, schedulers=2, faults=faults), Ledger())
    print(report)
    assert not report.wrong, str(report)
    assert report.states > at_least
    assert set(report.met) >= EVERYTHING  # no step of the model is dead


EVERYTHING = {
    "submit", "submit, reply lost", "dispatch: ok", "dispatch: not_leader", "reject: ok", "pop", "claim: True",
    "claim: False", "claim, reply lost: True", "generate", "complete: ok", "complete: void", "complete, reply lost: ok",
    "fail: ok", "fail: void", "hand back: ok", "beat: ok", "beat: stop", "register: True", "stop", "leave", "restart",
    "kill the worker", "kill the scheduler", "cancel: pending", "cancel: dispatched", "cancel: running",
    "a lease lapses", "a deadline passes", "a node falls silent", "leadership lapses", "sweep: 1",
    "lead: 2", "lead, reply lost: 2", "expire: 1", "beat: ok, unled: 1", "take back: ok",
}  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "says"),
    {
        "unfenced completion": "a result was taken from an attempt that does not hold the task",
        "last completion wins": "a task that had ended got a result",
        "pop before claim": "a task is stuck",
        "no lease expiry": "a task is stuck",
        "dispatch in two steps": "a final state changed",
        "unfenced scheduler": "a scheduler that does not lead placed a task",
        "blind submission": "a final state changed",
    }.items(),
)
def test_built_wrong_it_is_caught(broken: str, says: str) -> None:
    report = explore(start(tasks=2, nodes=2, schedulers=2, faults=1), Ledger(broken))
    print(f"{broken}: {BROKEN[broken]}\n{report}")
    assert report.wrong.startswith(says)
    assert report.trace


def test_every_way_to_build_it_wrong_is_tried() -> None:
    (marker,) = test_built_wrong_it_is_caught.pytestmark  # type: ignore[attr-defined]
    assert {broken for broken, _ in marker.args[1]} == set(BROKEN)


@pytest.fixture
def real(valkey: EmbeddedServer) -> RealLedger:
    return RealLedger(
        Settings.model_validate({"redis_url": valkey.url, "lease": 300, "heartbeat": 60, "max_strikes": 2})
    )


def test_the_ledger_does_what_the_model_says(real: RealLedger) -> None:
    met = Counter[str]()
    for seed in range(WALKS):
        world = start(tasks=2, nodes=2, schedulers=2, faults=8)
        met += walk(Stage(real, world), world, random.Random(seed), steps=60)
    real.close()
    missing = EVERYTHING - {"lead: 2", "lead, reply lost: 2"} - set(met)
    assert not missing, f"never met: {missing}"
    odd = {"odd claim: True", "odd claim: False", "odd complete: ok", "odd complete: void", "odd hand back: void"}
    odd |= {"odd dispatch: refused", "odd dispatch: node_gone", "odd dispatch: not_leader", "odd beat: unknown"}
    assert odd <= set(met), f"never met: {odd - set(met)}"


#: Random walks of up to 60 steps; enough to meet every kind of step.
WALKS = 400
