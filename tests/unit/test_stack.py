"""How the processes on one machine share its cores."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.local.supervisor import share_cores


@given(cores=st.integers(1, 256), edges=st.integers(0, 16), clouds=st.integers(0, 4))
def test_engines_never_use_more_threads_than_cores_while_there_are_enough(cores: int, edges: int, clouds: int) -> None:
    edge, cloud = share_cores(cores, edges, clouds)
    assert min(edge, cloud) >= 1
    assert edges * edge + clouds * cloud <= max(cores, edges + clouds)
