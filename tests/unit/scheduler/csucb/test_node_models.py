"""What is learned of a node from its engine's totals."""

from __future__ import annotations

import json

import pytest

from perllm.broker.messages import Counters, Heartbeat, NodeUp, StepCost, StepTotals
from perllm.scheduler import examples
from perllm.scheduler.core.cluster import Cluster, Node
from perllm.scheduler.csucb.node_models import NodeModels

CALIBRATED = StepCost(step=0.02, sequence=0.002, prefill=1e-4)
#: How much slower than calibrated each of a node's models is.
FACTORS = {"small": 0.5, "large": 1.5}


def both_worked(models: NodeModels, cluster: Cluster, readings: int, *, told_apart: bool) -> None:
    """So many intervals in which both models took steps, each at its own speed."""
    parts = dict.fromkeys(FACTORS, StepTotals())
    for i in range(readings):
        for name, factor in FACTORS.items():
            before, sequences = parts[name], 1 + i % 5
            busy = 10 * factor * (CALIBRATED.step + CALIBRATED.sequence * sequences) + factor * CALIBRATED.prefill * 100
            parts[name] = StepTotals(
                steps=before.steps + 10,
                busy=before.busy + busy,
                prefilled=before.prefilled + 100,
                sequence_steps=before.sequence_steps + 10 * sequences,
            )
        whole = Counters(
            steps=sum(part.steps for part in parts.values()),
            busy=sum(part.busy for part in parts.values()),
            prefilled=sum(part.prefilled for part in parts.values()),
            sequence_steps=sum(part.sequence_steps for part in parts.values()),
            longest_step=0.05,
            models=parts.copy() if told_apart else {},
        )
        models.observe(Heartbeat(at=1.0 + i, node="n", boot="n.1", counters=whole), None, cluster)


@pytest.fixture
def cluster() -> Cluster:
    info = examples.node_info("n", models=tuple(FACTORS), step_cost=CALIBRATED)
    return Cluster(nodes={"n": Node(info, since=0.0)})


@pytest.fixture
def models(cluster: Cluster) -> NodeModels:
    learned = NodeModels(4.0)
    learned.observe(NodeUp(at=0.0, info=cluster.nodes["n"].info), None, cluster)
    return learned


def steps_of(models: NodeModels, cluster: Cluster) -> dict[str, float]:
    """The time of a step of each model, as learned, s."""
    known = models.of(cluster.nodes["n"]).step_costs
    return {name: known[name].at_time(40.0)[0][0] for name in FACTORS}


def test_each_of_several_models_that_worked_is_learned_of(models: NodeModels, cluster: Cluster) -> None:
    both_worked(models, cluster, 40, told_apart=True)
    for name, step in steps_of(models, cluster).items():
        assert step == pytest.approx(FACTORS[name] * CALIBRATED.step, rel=0.15)


def test_what_cannot_be_told_apart_teaches_nothing(models: NodeModels, cluster: Cluster) -> None:
    both_worked(models, cluster, 40, told_apart=False)
    assert set(steps_of(models, cluster).values()) == {CALIBRATED.step}


def test_steps_too_few_to_tell_are_not_lost(models: NodeModels, cluster: Cluster) -> None:
    """One step at each reading: a sample is made of several."""
    for i in range(80):
        part = StepTotals(steps=i, busy=0.011 * i, sequence_steps=i)
        idle = StepTotals()
        whole = Counters(steps=i, busy=0.011 * i, sequence_steps=i, models={"small": part, "large": idle})
        models.observe(Heartbeat(at=1.0 + i / 2, node="n", boot="n.1", counters=whole), None, cluster)
    assert steps_of(models, cluster)["small"] == pytest.approx(0.5 * CALIBRATED.step, rel=0.2)
    assert steps_of(models, cluster)["large"] == CALIBRATED.step


def test_all_of_it_is_kept_over_a_restart(models: NodeModels, cluster: Cluster) -> None:
    both_worked(models, cluster, 3, told_apart=True)
    state = json.loads(json.dumps(models.snapshot()))
    copy = NodeModels(4.0)
    copy.restore(state)
    assert copy.snapshot() == models.snapshot()
    assert copy.estimate(cluster.nodes["n"]) == models.estimate(cluster.nodes["n"])
