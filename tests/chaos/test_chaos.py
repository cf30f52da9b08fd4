"""The short form of `make chaos`: the real system under blows, and nothing lost, nothing doubled, nothing stuck."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import perllm
from chaos.plan import plan

KILLS, TASKS = 24, 2_000
#: Any will do; a run that fails names it, and `make chaos SEED=...` lets the same blows fall again.
SEED = 7


@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_or_stuck_whatever_dies(tmp_path: Path) -> None:
    blows = plan(SEED, KILLS, gap=1.0)
    quick = {"policy": "least-loaded"}  # what is tested is all but the policy
    outcome = perllm.run(tmp_path, blows, TASKS, SEED, **quick, real=True, show=lambda *_: None)
    assert outcome.report.violations == [], outcome.details
    assert outcome.crashes == []
    assert outcome.good
    assert outcome.figures["kills"] >= KILLS
    assert outcome.report.tasks >= TASKS
    assert outcome.by_model["real"] > 0
    assert {kind.split(".")[0] for kind in outcome.kinds} == {"worker", "scheduler", "producer", "api", "server"}
