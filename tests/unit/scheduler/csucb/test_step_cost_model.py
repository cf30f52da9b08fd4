"""The step-cost model: what it learns, and the traps that forgetting, stalls and rotating slowdowns set."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from perllm.broker.messages import Counters, StepCost
from perllm.scheduler.csucb.step_cost import RELAXATION, Sample, StepCostModel, sample_between, stalled

TRUE = np.array([0.02, 0.001, 1e-4, 7e-7])


def calibration(factor: float = 1.0) -> StepCost:
    a, b, c, d = (TRUE * factor).tolist()
    return StepCost(step=a, sequence=b, prefill=c, context=d)


def sample(rng: np.random.Generator, factor: float = 1.0, noise: float = 0.05) -> Sample:
    """Half a second or so of a batch of 1 to 16."""
    steps, batch = int(rng.integers(10, 30)), int(rng.integers(1, 17))
    x = np.array([steps, steps * batch, rng.integers(0, 400), steps * batch * rng.integers(50, 500)], float)
    return Sample(x, float(x @ TRUE) * factor * math.exp(noise * rng.standard_normal()))


def ratio(model: StepCostModel) -> float:
    """Predicted over true time of a usual step."""
    x = np.array([1.0, 8.0, 10.0, 2000.0])
    return float(x @ model.mean) / float(x @ TRUE)


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.5, 2.5])
def test_a_wrong_calibration_is_mended_within_seconds(factor: float) -> None:
    rng, model = np.random.default_rng(0), StepCostModel.calibrated(calibration(factor), 0.0)
    for i in range(12):
        model.learn(sample(rng), float(i + 1))
    assert ratio(model) == pytest.approx(1.0, abs=0.12)


def test_one_wild_sample_is_set_aside_and_two_on_a_side_are_believed() -> None:
    rng, model = np.random.default_rng(1), StepCostModel.calibrated(calibration(), 0.0)
    for i in range(20):
        model.learn(sample(rng), float(i))
    assert not model.learn(sample(rng, factor=6.0), 20.0)  # a stall nobody flagged
    assert ratio(model) == pytest.approx(1.0, abs=0.1)
    assert model.learn(sample(rng), 21.0)
    assert not model.learn(sample(rng, factor=2.5), 22.0)
    assert model.learn(sample(rng, factor=2.5), 23.0)
    model.learn(sample(rng, factor=2.5), 24.0)
    assert ratio(model) == pytest.approx(2.5, rel=0.2)


def test_collinear_features_do_not_let_the_uncertainty_run_away() -> None:
    """A batch of always 4 tells only a + 4b + …; plain exponential forgetting diverges here."""
    rng, model = np.random.default_rng(2), StepCostModel.calibrated(calibration(), 0.0)
    x = np.array([20.0, 80.0, 0.0, 80.0 * 200])
    for i in range(5000):
        y = float(x @ TRUE) * math.exp(0.05 * rng.standard_normal())
        model.learn(Sample(x, y), 0.5 * i)
    assert np.all(np.linalg.eigvalsh(model.cov) > -1e-18)
    assert np.all(np.sqrt(np.diag(model.cov)) <= 0.6 * np.maximum(TRUE, 1e-6))
    assert ratio(model) == pytest.approx(1.0, abs=0.25)  # even for batches never seen


def test_rotating_slowdowns_are_followed_there_and_back() -> None:
    """Without forgetting, every turn would take longer to be believed than the one before."""
    rng, model, errors = np.random.default_rng(3), StepCostModel.calibrated(calibration(), 0.0), []
    for i in range(600):
        factor = 2.5 if (i // 30) % 2 else 1.0
        model.learn(sample(rng, factor=factor), float(i))
        if i % 30 >= 8:
            errors.append(abs(math.log(ratio(model) / factor)))
    assert np.mean(errors) < 0.12
    assert np.mean(errors[-100:]) < 0.15


def test_without_data_it_returns_to_the_calibration() -> None:
    rng, model = np.random.default_rng(4), StepCostModel.calibrated(calibration(), 0.0)
    for i in range(60):
        model.learn(sample(rng, factor=2.0), float(i))
    theta, spread, count = model.at_time(59.0)
    later, wider, fewer = model.at_time(59.0 + RELAXATION)
    assert later[0] - TRUE[0] == pytest.approx((theta[0] - TRUE[0]) / math.e, rel=1e-6)
    assert wider > spread
    assert fewer == pytest.approx(count / math.e)
    model.relax(59.0 + RELAXATION)
    assert model.at_time(59.0 + RELAXATION)[0] == pytest.approx(later)


def test_a_sample_set_aside_leaves_no_stale_view() -> None:
    rng, model = np.random.default_rng(5), StepCostModel.calibrated(calibration(), 0.0)
    for i in range(20):
        model.learn(sample(rng, factor=1.6), float(i))
    assert not model.learn(sample(rng, factor=20.0), 50.0)
    assert model.at_time(50.0)[0] == pytest.approx(tuple(model.mean.tolist()))


def test_coefficients_stay_positive() -> None:
    model = StepCostModel.calibrated(calibration(), 0.0)
    for i in range(50):
        model.learn(Sample(np.array([10.0, 10.0, 0.0, 0.0]), 1e-6), float(i))
    assert np.all(model.mean > 0)


def test_only_readings_that_tell_something_are_samples() -> None:
    before = Counters(steps=100, busy=2.0, sequence_steps=400)
    assert sample_between(before, before) is None
    assert sample_between(before, before.model_copy(update={"steps": 101, "busy": 2.02})) is None
    assert sample_between(before, Counters()) is None  # another life
    got = sample_between(before, Counters(steps=120, busy=2.5, sequence_steps=480, prefilled=7, context_steps=900))
    assert got is not None
    assert got.features.tolist() == [20, 80, 7, 900]
    assert got.seconds == pytest.approx(0.5)


def test_standing_still() -> None:
    assert not stalled(Counters(since_progress=0.49), longest=0.1)
    assert stalled(Counters(since_progress=0.51), longest=0.1)


def test_snapshot_round_trip_is_exact() -> None:
    rng, model = np.random.default_rng(6), StepCostModel.calibrated(calibration(), 0.0)
    for i in range(10):
        model.learn(sample(rng), float(i))
    again = StepCostModel.restored(json.loads(json.dumps(model.snapshot())))
    next_one = sample(rng)
    assert model.learn(next_one, 11.0) == again.learn(next_one, 11.0)
    assert model.snapshot() == again.snapshot()
    assert model.at_time(30.0) == again.at_time(30.0)
