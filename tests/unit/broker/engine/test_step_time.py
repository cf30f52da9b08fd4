"""What is computed with a step cost."""

from __future__ import annotations

from perllm.broker.engine.step_time import decode_work
from perllm.broker.messages import StepCost


def test_a_token_in_company_weighs_less() -> None:
    cost = StepCost(step=5e-3, sequence=2e-5, prefill=2.6e-5)
    assert decode_work(cost, sequences=1, context=0) > 20 * decode_work(cost, sequences=64, context=0)
