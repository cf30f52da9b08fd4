"""The heuristics' forecast."""

from __future__ import annotations

import pytest
from support.baselines import node, task

from perllm.scheduler.baselines.calibrated_forecast import forecast
from perllm.scheduler.baselines.mean_length import MeanLength


def test_the_forecast_is_the_calibration_for_a_task_alone_and_grows_with_the_queue() -> None:
    lengths = MeanLength()
    lengths.sums.put("default", "s", [1e9, 40e9])  # mean of 40, beyond doubt
    n = node("a")
    cal = n.info.models[0].calibration
    alone = forecast(n, task(payload=1_000_000), lengths)
    assert alone.alone == pytest.approx(0.1 + 200 * cal.prefill + 40 * (cal.step + cal.sequence), rel=1e-6)
    finishes = [forecast(node("a", held=h), task(), lengths).finish for h in range(10)]
    assert finishes == sorted(finishes)
    assert finishes[9] > 2 * finishes[3]  # a full turn of the slots later
