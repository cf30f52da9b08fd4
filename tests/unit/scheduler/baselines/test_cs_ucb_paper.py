"""CS-UCB as published, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
from support.baselines import cluster, completed, feed, node, placed, task

from perllm.scheduler.baselines.cs_ucb_paper import CsUcbPaper


def test_cs_ucb_paper_tries_untried_servers_first_then_the_index() -> None:
    two = cluster(node("a"), node("b"))
    policy = CsUcbPaper()
    assert placed(policy, task("1"), two) == "a"
    feed(policy, two, "a", at=1.0, joules=10)
    assert placed(policy, task("2"), two) == "b"
    feed(policy, two, "b", at=2.0, joules=20)
    # f = min(deadline slack, compute slack of 5/6 at placement or 1 unknown); E_norm = the largest energy so far
    a, b = policy.arms.get("default", "s")["a"], policy.arms.get("default", "s")["b"]
    assert a.reward == pytest.approx(min(0.8, 5 / 6, 1) - 10 / 10)
    assert b.reward == pytest.approx(0.6 - 20 / 20)
    explained = {c.node: c for c in policy.explain(task("3"), list(two.nodes.values()), two, 0.0)}
    bonus = 0.5 * math.sqrt(math.log(2) / 1)
    assert explained["a"].index == pytest.approx(-0.2 + bonus)
    assert explained["a"].confidence == pytest.approx(bonus)
    assert explained["b"].slacks == pytest.approx({"deadline": 0.6, "compute": 5 / 6, "bandwidth": 1 - 200 / 1e7})
    assert placed(policy, task("3"), two) == "a"


def test_cs_ucb_paper_penalises_only_where_no_server_is_feasible() -> None:
    two = cluster(node("a"), node("b"))
    policy = CsUcbPaper()
    for _ in range(3):
        feed(policy, two, "a", at=4.0, joules=1)  # slow and cheap: a better mean reward than b's
        feed(policy, two, "b", at=1.0, joules=100)
    assert policy.arms.get("default", "s")["a"].reward > policy.arms.get("default", "s")["b"].reward
    assert placed(policy, task(left=5.0), two) == "a"
    assert placed(policy, task(left=2.0), two) == "b"  # a is infeasible: D̂ = 4 s
    explained = {c.node: c for c in policy.explain(task(left=0.5), list(two.nodes.values()), two, 0.0)}
    assert not explained["a"].feasible
    assert not explained["b"].feasible
    plain = policy.arms.get("default", "s")["a"].reward + explained["a"].confidence  # type: ignore[operator]
    assert explained["a"].index == pytest.approx(plain + (0.5 - 4.0) / 0.5)
    assert "short of deadline" in explained["a"].note
    assert placed(policy, task(left=0.5), two) == "b"


def test_cs_ucb_paper_keeps_to_feasible_servers_whatever_their_index() -> None:
    two = cluster(node("a"), node("b"))
    policy = CsUcbPaper(theta=0.0)  # so that only feasibility speaks against the better index
    for _ in range(3):
        feed(policy, two, "a", at=4.0, joules=1)
        feed(policy, two, "b", at=1.0, joules=100)
    explained = {c.node: c.index for c in policy.explain(task(left=2.0), list(two.nodes.values()), two, 0.0)}
    assert explained["a"] > explained["b"]  # type: ignore[operator]
    assert placed(policy, task(left=2.0), two) == "b"
    assert placed(policy, task(left=0.5), two) == "a"  # none is feasible: the index alone


def test_cs_ucb_paper_counts_work_in_flight() -> None:
    policy = CsUcbPaper()
    full = cluster(node("a", held=6), node("b", held=5))
    explained = {c.node: c for c in policy.explain(task(), list(full.nodes.values()), full, 0.0)}
    assert explained["a"].slacks["compute"] == pytest.approx(-1 / 6)
    assert explained["b"].slacks["compute"] == 0
    heavy = task(payload=60_000_000)
    explained = {c.node: c for c in policy.explain(heavy, list(full.nodes.values()), full, 0.0)}
    assert explained["a"].slacks["bandwidth"] == pytest.approx(1 - (60e6 / 5 + 6 * 1000 / 5) / 1e7)
    for flight in full.nodes["a"].in_flight.values():
        flight.claimed = 0.1  # here already: the link is free of it
    explained = {c.node: c for c in policy.explain(heavy, list(full.nodes.values()), full, 0.0)}
    assert explained["a"].slacks["bandwidth"] == pytest.approx(1 - 60e6 / 5 / 1e7)


def test_cs_ucb_paper_holds_a_cut_task_against_its_server() -> None:
    policy = CsUcbPaper()
    one = cluster(node("a"))
    t = task()
    t.node, t.dispatched = "a", 0.0
    policy.observe(completed(t, "a", at=5.0, joules=10, cut=True), t, one)
    assert policy.arms.get("default", "s")["a"].delay == pytest.approx(10.0)
    assert policy.arms.get("default", "s")["a"].reward == pytest.approx(-1 - 1)
