"""LinUCB."""

from __future__ import annotations

import numpy as np
from support.baselines import cluster, completed, node, place, task

from perllm.scheduler.baselines.lin_ucb import LinUcb
from perllm.scheduler.policies import make_policy


def test_linucb_learns_from_the_queue_it_saw() -> None:
    """The same node is good while short and bad while long: only features can tell."""
    policy = make_policy("linucb", 1)
    for i in range(200):
        full = i % 2 == 1
        where = cluster(node("a", held=8 if full else 0))
        t = task(str(i))
        place(policy, t, where)
        policy.observe(completed(t, "a", at=7.0 if full else 2.0), t, where)
    assert isinstance(policy, LinUcb)
    short, long = (policy.index("a", np.array(policy.x(task(), node("a", held=h), 0.0))) for h in (0, 8))
    assert short > 0.9
    assert long < 0.4
