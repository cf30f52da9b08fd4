"""What `+mech` adds to a baseline."""

from __future__ import annotations

from support.baselines import cluster, node, placed, task

from perllm.scheduler.core.policy import Reject, Wait
from perllm.scheduler.policies import make_policy


def test_admission_says_whether_and_not_where() -> None:
    slow, fast = node("slow", step=0.5), node("fast", step=0.01)
    both = cluster(slow, fast)
    policy = make_policy("round-robin+mech")
    assert placed(policy, task(left=3.0), both) == "slow"  # some node is in time, round robin does what it does
    full = cluster(slow, node("fast", step=0.01, held=30))
    assert policy.choose(task(left=3.0), list(full.nodes.values()), full, 0.0) == Wait()
    hopeless = policy.choose(task(left=0.05), list(both.nodes.values()), both, 0.0)
    assert isinstance(hopeless, Reject)
    assert "even an empty node would take" in hopeless.reason
