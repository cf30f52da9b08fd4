"""Trace files: read back as written, replayed with the same tasks, refused with the line that is wrong."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.simulation import recorded_events

from perllm.broker.errors import BadSetting
from perllm.broker.messages import Completed, Energy, NodeUp, Receipt, State, Submitted
from perllm.scheduler.simulator.scenario import load_scenario
from perllm.scheduler.simulator.simulation import Simulation
from perllm.scheduler.simulator.trace import arrivals_of, read_trace, stretched, write_trace


def test_a_trace_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    assert write_trace(path, recorded_events()) == len(recorded_events())
    assert [e.model_dump_json() for e in read_trace(path)] == [e.model_dump_json() for e in recorded_events()]
    assert list(path.parent.iterdir()) == [path]


def test_a_replay_has_the_tasks_that_were_there(tmp_path: Path) -> None:
    truth = {a.event.id: a for a in Simulation(load_scenario("paper").model_copy(update={"tasks": 120}),
                                                "random", load=1.2, seed=2).arrivals}  # fmt: skip
    replayed = arrivals_of(recorded_events())
    assert {a.event.id for a in replayed} == set(truth)
    done = {e.id: e for e in recorded_events() if isinstance(e, Completed)}
    whole = cut = 0
    for arrival in replayed:
        original = truth[arrival.event.id]
        assert arrival.event.deadline - arrival.event.at == pytest.approx(original.event.deadline - original.event.at)
        ended = done.get(arrival.event.id)
        if ended is not None and ended.state is State.SUCCEEDED:
            assert arrival.output == original.output
            whole += 1
        elif ended is not None and ended.receipt.completion_tokens:
            assert arrival.output > ended.receipt.completion_tokens
            cut += 1
    assert whole > 20
    assert cut > 5
    gaps = [b.event.at - a.event.at for a, b in pairwise(replayed)]
    wide = stretched(replayed, 2.0, 50.0)
    assert wide[0].event.at == 50.0
    assert [b.event.at - a.event.at for a, b in pairwise(wide)] == pytest.approx([2 * g for g in gaps])
    assert [a.event.deadline - a.event.at for a in wide] == pytest.approx(
        [a.event.deadline - a.event.at for a in replayed]
    )


def test_a_task_of_several_answers_is_replayed_as_the_longest() -> None:
    receipt = Receipt(
        node="n",
        model="m",
        attempt=1,
        completion_tokens=60,
        choice_tokens=(10, 50),
        energy=Energy(method="emulated", estimated=True),
    )
    done: dict[str, Any] = {"node": "n", "attempt": 1, "on_time": True, "latency": 1.0, "queued": 0.0}
    log = [
        Submitted(at=5.0, id="a", deadline=9.0, max_tokens=300, n=2),
        Completed(at=6.0, id="a", state=State.SUCCEEDED, receipt=receipt, **done),
    ]
    (arrival,) = arrivals_of(log)
    assert (arrival.output, arrival.event.n) == (50, 1)


def test_a_cut_task_without_longer_ones_runs_to_its_limit() -> None:
    receipt = Receipt(
        node="n", model="m", attempt=1, completion_tokens=50, energy=Energy(method="emulated", estimated=True)
    )
    log = [
        Submitted(at=5.0, id="a", deadline=9.0, max_tokens=300),
        Completed(
            at=9.0,
            id="a",
            node="n",
            attempt=1,
            state=State.EXPIRED,
            on_time=False,
            latency=4,
            queued=0,
            receipt=receipt,
        ),
    ]
    (only,) = arrivals_of(log)
    assert (only.output, only.event.at, only.event.deadline) == (300, 0.0, 4.0)


GOOD = Submitted(at=1.0, id="a", deadline=2.0).model_dump_json()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "line 1: not a PerLLM trace"),
        ([GOOD], "line 1: not a PerLLM trace"),
        (['{"perllm_trace": 9}'], "line 1: version 9 of the format; this program reads 1"),
        (['{"perllm_trace": 1}', GOOD, "{"], "line 3: "),
        (['{"perllm_trace": 1}', "", '{"type": "submitted", "at": 1, "id": "a"}'], "line 3: submitted.deadline: Field"),
        (['{"perllm_trace": 1}', GOOD.replace('"at":1.0', '"at":-1.0')], "line 2: at: a time cannot be negative"),
        (['{"perllm_trace": 1}', GOOD.replace('"deadline":2.0', '"deadline":0.5')], "line 2: deadline: not after"),
        (['{"perllm_trace": 1}', GOOD.replace('"max_tokens":128', '"max_tokens":0')], "line 2: max_tokens: must be"),
        (['{"perllm_trace": 1}', GOOD.replace('"payload_bytes":0', '"payload_bytes":-1')], "line 2: submitted.payload"),
        (['{"perllm_trace": 1}', GOOD.replace('"type":"submitted"', '"type":"eaten"')], "line 2: "),
    ],
)
def test_a_wrong_trace_says_which_line(tmp_path: Path, lines: list[str], says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(BadSetting, match=re.escape(f"trace {path}, {says}")):
        read_trace(path)


def test_a_trace_without_tasks_is_refused() -> None:
    with pytest.raises(BadSetting, match="no task was submitted"):
        arrivals_of([e for e in recorded_events() if isinstance(e, NodeUp)])


def test_a_trace_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("before")

    def broken() -> Any:
        yield recorded_events()[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(BadSetting, match="No space left"):
        write_trace(path, broken())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
