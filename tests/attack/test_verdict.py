"""The judge of a campaign sees each broken promise, and attacks are the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from attack import bombs
from attack.hostile import sequence
from attack.kinds import KINDS
from attack.verdict import judge

Lines = list[dict[str, Any]]


def good() -> tuple[Lines, Lines]:
    """A neighbour's 100 operations alone and 100 beside two attacks, all well."""
    ops: Lines = []
    for n in range(200):
        ops.append({"op": "chat", "at": 100.0 + n, "took": 0.2, "failure": None, "id": f"t{n}"})
        ops.append({"op": "told", "at": 100.5 + n, "id": f"t{n}"})
    lines: Lines = [
        {"kind": "heads", "number": 1, "at": 201.0, "began": True},
        {"kind": "heads", "number": 1, "at": 202.0, "request": "GET /", "said": "400", "took": 0.1, "text": ""},
        {"kind": "flower", "number": 1, "at": 230.0, "began": True},
        {"kind": "flower", "number": 1, "at": 230.5, "request": "POST /api", "said": "403", "took": 0.1, "text": ""},
    ]
    return ops, lines


def be_late(ops: Lines, _: Lines) -> None:
    for op in ops[-30::2]:
        op["took"] = 6.0


def be_broken(ops: Lines, _: Lines) -> None:
    ops[-20]["failure"] = "503 the queue cannot be reached"


def be_cut(ops: Lines, _: Lines) -> None:
    ops[-20]["failure"] = "ConnectError refused"


def be_refused(ops: Lines, _: Lines) -> None:
    ops[-20]["failure"] = "429 too many"


def tell_late(ops: Lines, _: Lines) -> None:
    ops[-1]["at"] += 60


def tell_never(ops: Lines, _: Lines) -> None:
    del ops[-1]


def answer_500(_: Lines, lines: Lines) -> None:
    lines[1]["said"] = "500"


def obey(_: Lines, lines: Lines) -> None:
    lines[3]["said"] = "200"


def do_nothing(ops: Lines, _: Lines) -> None:
    del ops[200:]


def test_what_keeps_every_promise_passes() -> None:
    verdict = judge(*good(), 200.0, 300.0)
    assert verdict.failures == []
    assert verdict.kinds == {"flower": {"attacks": 1, "4xx": 1}, "heads": {"attacks": 1, "4xx": 1}}
    assert (verdict.figures["on_time_alone"], verdict.figures["operations_attacked"]) == (1.0, 100)


@pytest.mark.parametrize(
    ("breach", "said"),
    [
        (be_late, "share on time: 0.850"),
        (be_broken, "5xx or no answer"),
        (be_cut, "5xx or no answer"),
        (be_refused, "were refused"),
        (tell_late, "came late or never"),
        (tell_never, "came late or never"),
        (answer_500, "heads 1: GET /"),
        (obey, "Flower obeyed"),
        (do_nothing, "did nothing"),
    ],
)
def test_a_broken_promise_is_seen(breach: Callable[[Lines, Lines], None], said: str) -> None:
    ops, lines = good()
    breach(ops, lines)
    assert said in "\n".join(judge(ops, lines, 200.0, 300.0).failures)


def test_the_same_seed_gives_the_same_attacks() -> None:
    names = list(KINDS)
    first, again, other = (list(islice(sequence(seed, names), 300)) for seed in (3, 3, 4))
    assert first == again != other
    assert {kind for kind, _ in first[: len(names)]} == set(names)  # each kind once before any twice
    for make in (bombs.nested, bombs.ambiguous, bombs.repeated, bombs.recursive, bombs.noisy):
        made = [make(random.Random(f"{n}")) for n in range(50)]
        assert made == [make(random.Random(f"{n}")) for n in range(50)]
        assert len(set(made)) > 5
    for make_schema in (bombs.bounded, bombs.referring, bombs.patterned):
        assert json.dumps(make_schema(random.Random(1))) == json.dumps(make_schema(random.Random(1)))
