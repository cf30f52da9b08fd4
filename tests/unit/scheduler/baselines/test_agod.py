"""AGOD, where torch is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from support.baselines import cluster, completed, node, place, placed, task

from perllm.broker.errors import BadSetting
from perllm.scheduler.policies import make_policy


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is there")
def test_agod_without_torch_says_what_to_install() -> None:
    with pytest.raises(BadSetting, match=r"policy 'agod' needs torch: pip install 'perllm\[agod\]'"):
        make_policy("agod")


def test_agod_learns_which_node_is_on_time_and_snapshots_its_networks() -> None:
    pytest.importorskip("torch")
    two = cluster(node("good"), node("bad"))
    policy = make_policy("agod", 1)
    chosen = []
    for i in range(6000):
        t = task(str(i), left=2 + i % 5)
        where = place(policy, t, two)
        chosen.append(where)
        policy.observe(completed(t, where, at=1.0 if where == "good" else 7.0), t, two)
    assert chosen[-500:].count("good") > 450
    second = make_policy("agod", 2)
    second.restore(json.loads(json.dumps(policy.snapshot())))
    tasks = [task(str(i)) for i in range(50)]
    assert [placed(second, t, two) for t in tasks] == [placed(policy, t, two) for t in tasks]
