"""What holds for every policy: it decides again as it did from its snapshot, explains without a change, and what learns
learns."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
from support.baselines import cluster, completed, node, place, task

from perllm.broker.errors import BadSetting
from perllm.broker.messages import Submitted
from perllm.scheduler.core.policy import Place, Policy
from perllm.scheduler.policies import make_policy, policy_names

PLAIN = [name for name in policy_names() if name != "agod" or find_spec("torch")]
ALL = [*PLAIN, *(f"{name}+mech" for name in PLAIN if name != "cs-ucb")]


@pytest.mark.parametrize("name", ["ucb1", "thompson", "linucb", "cs-ucb-paper", "rewardless-guidance"])
def test_what_learns_comes_to_prefer_the_node_that_is_on_time(name: str) -> None:
    two = cluster(node("good"), node("bad"))
    policy = make_policy(name, 1)
    counts = {"good": 0, "bad": 0}
    for i in range(300):
        t = task(str(i))
        where = place(policy, t, two)
        counts[where] += i >= 200
        policy.observe(completed(t, where, at=2.0 if where == "good" else 7.0), t, two)
    assert counts["good"] > 75


@pytest.mark.parametrize("name", ALL)
def test_a_restored_policy_decides_as_the_first(name: str) -> None:
    nodes = cluster(node("a"), node("b", step=0.02, held=1), node("c", tier="cloud", step=0.01, watts=400))

    def live(policy: Policy, begin: int, end: int) -> list[Any]:
        chosen = []
        for i in range(begin, end):
            t = task(str(i), service=f"s{i % 3}", left=2 + i % 5)
            choice = policy.choose(t, list(nodes.nodes.values()), nodes, 0.0)
            chosen.append(choice)
            if isinstance(choice, Place):
                t.node, t.dispatched, t.attempt = choice.node, 0.0, 1
                at = {"a": 3.0, "b": 1.5, "c": 0.7}[choice.node] + 0.01 * (i % 7)
                policy.observe(completed(t, choice.node, at=at, joules=5 + i % 4), t, nodes)
        return chosen

    first = make_policy(name, 5)
    live(first, 0, 60)
    state = json.loads(json.dumps(first.snapshot()))
    second = make_policy(name, 99)
    second.restore(state)
    assert live(second, 60, 120) == live(first, 60, 120)
    assert json.dumps(first.snapshot()) == json.dumps(second.snapshot())


@pytest.mark.parametrize("name", ALL)
def test_explaining_changes_nothing(name: str) -> None:
    nodes = cluster(node("a"), node("b"))
    policy = make_policy(name, 5)
    policy.choose(task(), list(nodes.nodes.values()), nodes, 0.0)
    before = json.dumps(policy.snapshot())
    explained = policy.explain(task(), list(nodes.nodes.values()), nodes, 0.0)
    assert [c.node for c in explained] == ["a", "b"]
    assert json.dumps(policy.snapshot()) == before


@pytest.mark.parametrize("name", ALL)
def test_a_foreign_snapshot_is_refused_and_nothing_changes(name: str) -> None:
    policy = make_policy(name, 5)
    before = json.dumps(policy.snapshot())
    with pytest.raises((KeyError, ValueError)):
        policy.restore({})
    assert json.dumps(policy.snapshot()) == before


def test_unknown_names_and_options_say_what_there_is() -> None:
    with pytest.raises(BadSetting, match=r"no 'jsq'; choose one of random, round-robin"):
        make_policy("jsq")
    with pytest.raises(BadSetting, match=r"policy 'fineinfer': .*'bound'"):
        make_policy("fineinfer", bound=2)


def test_events_of_tasks_never_placed_are_harmless() -> None:
    nodes = cluster(node("a"))
    event = Submitted(at=0.0, id="x", deadline=5.0)
    for name in ALL:
        policy = make_policy(name)
        policy.observe(event, None, nodes)
        policy.observe(completed(task("y"), "gone", at=1.0), None, nodes)
