"""Edge only and cloud only."""

from __future__ import annotations

from support.baselines import cluster, node, placed, task

from perllm.scheduler.core.policy import Wait
from perllm.scheduler.policies import make_policy


def test_one_tier_waits_while_its_tier_has_no_room() -> None:
    both = cluster(node("e"), node("c", tier="cloud"))
    assert placed(make_policy("edge-only"), task(), both) == "e"
    assert placed(make_policy("cloud-only"), task(), both) == "c"
    assert make_policy("cloud-only").choose(task(), [both.nodes["e"]], both, 0.0) == Wait()
