"""FineInfer's deferred batches."""

from __future__ import annotations

from support.baselines import cluster, node, task

from perllm.scheduler.baselines.fine_infer import FineInfer
from perllm.scheduler.core.policy import Place, Wait


def test_fineinfer_lets_a_batch_go_when_its_first_task_has_waited() -> None:
    cloud = cluster(node("c", tier="cloud"))
    nodes = list(cloud.nodes.values())
    policy = FineInfer(deferral=1.0)
    first, second, third = task("1"), task("2"), task("3")
    second.submitted, third.submitted = 0.7, 1.2
    assert policy.choose(first, nodes, cloud, 0.0) == Wait()
    assert policy.choose(second, nodes, cloud, 0.9) == Wait()
    assert [policy.choose(t, nodes, cloud, 1.05) for t in (first, second)] == [Place("c")] * 2
    assert policy.choose(third, nodes, cloud, 1.3) == Wait()
    assert policy.choose(third, nodes, cloud, 2.1) == Wait()
    assert policy.choose(third, nodes, cloud, 2.25) == Place("c")
