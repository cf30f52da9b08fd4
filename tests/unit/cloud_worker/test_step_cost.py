"""The step cost fitted at the start, on made-up engines and on the steps measured on an H200."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.engine.step_time import step_time
from perllm.broker.messages import StepCost
from perllm.cloud_worker.step_cost import TimedStep, fit_step_cost

BATCHES = ((1, 16), (64, 16), (64, 1024), (1, 1024))


@given(
    step=st.floats(1e-4, 0.1),
    sequence=st.floats(0, 1e-2),
    prefill=st.floats(1e-6, 1e-3),
    context=st.floats(0, 1e-6),
)
def test_an_engine_that_is_as_the_model_says_is_found_exactly(
    step: float, sequence: float, prefill: float, context: float
) -> None:
    true = StepCost(step=step, sequence=sequence, prefill=prefill, context=context)
    steps = [TimedStep(step_time(true, sequences=n, context=n * c), n, 0, n * c) for n, c in BATCHES]
    steps += [TimedStep(step_time(true, sequences=1, prefilled=p, context=p), 1, p, p) for p in (512, 1024)]
    found = fit_step_cost(steps)
    for one in steps:
        predicted = step_time(found, sequences=one.sequences, prefilled=one.prefilled, context=one.context)
        assert predicted == pytest.approx(one.seconds, rel=1e-4)


@given(
    st.lists(
        st.tuples(st.floats(1e-4, 1), st.integers(1, 256), st.integers(0, 9000), st.integers(0, 300_000)), min_size=1
    )
)
def test_no_coefficient_is_below_zero_whatever_was_timed(timed: list[tuple[float, int, int, int]]) -> None:
    found = fit_step_cost([TimedStep(*one) for one in timed])
    assert all(value >= 0 for value in (found.step, found.sequence, found.prefill, found.context))


@pytest.mark.parametrize("model", ["8b", "33b"])
def test_the_steps_tried_at_boot_predict_the_others_of_a_measured_gpu(model: str) -> None:
    name = f"vllm-0.25.1_h200_llama-{model}-bf16_phases.json"
    rows = json.loads(files("perllm.scheduler.simulator.profiles").joinpath(name).read_text())["rows"]
    decodes = [r for r in rows if r["phase"] == "decode"]
    tried = [r for r in decodes if r["B"] in (1, 64, 256) and r["ctx"] in (64, 1024)]
    steps = [TimedStep(r["step_s"], r["B"], 0, r["B"] * r["ctx"]) for r in tried]
    prefills = [r for r in rows if r["phase"] == "prefill" and r["par"] == 1]
    steps += [TimedStep(r["s_per_request"], 1, r["prompt"], r["prompt"]) for r in prefills]
    found = fit_step_cost(steps)
    for r in decodes:
        predicted = step_time(found, sequences=r["B"], context=r["B"] * r["ctx"])
        assert predicted == pytest.approx(r["step_s"], rel=0.25), r
