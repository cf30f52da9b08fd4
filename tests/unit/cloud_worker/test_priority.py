"""The order in which vLLM takes waiting requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perllm.cloud_worker.priority import priority


def test_the_earlier_deadline_and_the_greater_value_go_first() -> None:
    now = 1000.0
    assert priority(now, 5.0, 1.0, 1.0) < priority(now, 6.0, 1.0, 1.0)
    assert priority(now, 5.0, 1.0, 2.0) < priority(now, 5.0, 1.0, 1.0)  # more work: less slack
    assert priority(now, 60.0, 10.0, 1.0) < priority(now, 60.0, 1.0, 1.0)
    assert priority(now, 60.0, 1.0, 1.0) < priority(now, None, 1.0, 1.0)
    assert priority(now + 30, 10.0, 1.0, 1.0) < priority(now, 60.0, 1.0, 1.0)  # came later, must begin earlier


@given(remaining=st.none() | st.floats(0, 30 * 86_400), value=st.floats(1e-6, 1e6), work=st.floats(0, 1e6))
def test_a_priority_fits_vllm_s_integers(remaining: float | None, value: float, work: float) -> None:
    assert 0 <= priority(1e6, remaining, value, work) < 1 << 63
