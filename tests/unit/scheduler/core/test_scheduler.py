"""Rounds of the core: which tasks are decided about, when, and that waiting costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
from support.core import Scripted, completed, core_with, info, submitted

from perllm.broker.messages import (
    Counters,
    Dispatched,
    Heartbeat,
    NodeDown,
    NodeUp,
    Returned,
)
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Choice, Reject, Wait
from perllm.scheduler.core.scheduler import (
    AVOID_SECONDS,
    AWAIT_NODES,
    AWAIT_RETURN,
    LOOKAHEAD,
    MAX_LONG_WAITS,
    MAX_REFUSED,
    MAX_RETRIES,
    SchedulerCore,
)


def test_most_urgent_first_until_the_nodes_are_full() -> None:
    core = core_with(Scripted(), info("n", slots=1))  # holds 1 + 2
    for i in range(5):
        core.handle(submitted(f"t{i}", deadline=100 - i))
    assert [d.task.id for d in core.decide(0)] == ["t4", "t3", "t2"]
    assert core.decide(0) == []
    core.handle(completed("t3", "n", 1))
    assert [d.task.id for d in core.decide(1)] == ["t1"]


def test_answers_take_slots_and_an_idle_node_takes_any_number_of_them() -> None:
    core = core_with(Scripted(), info("n", slots=2))  # holds 2 + 2
    for i, n in enumerate((16, 1, 2, 1)):
        core.handle(submitted(f"t{i}", deadline=50 + i, n=n))
    assert [d.task.id for d in core.decide(0)] == ["t0", "t1", "t2"]  # the first takes all slots, and no more
    node = core.cluster.nodes["n"]
    assert node.taken == 2 + 1 + 2
    assert core.find("t0").n == 16  # type: ignore[union-attr]
    core.handle(completed("t0", "n", at=1.0))
    core.handle(NodeUp(at=2.0, info=info("n", slots=2)))
    assert core.cluster.nodes["n"].taken == 3
    assert [d.task.id for d in core.decide(2.0)] == ["t3"]


def test_beside_an_idle_node_every_parked_task_has_its_turn() -> None:
    """Not the two of the highest rank again and again; and beside a node at work nobody is asked for a heartbeat."""

    class Ranking(Scripted):
        def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
            super().choose(task, candidates, cluster, now)
            return Wait(until=1000.0, rank=float(task.id[1:]))

    policy = Ranking()
    core = core_with(policy, info("n", slots=8))
    tasks = {f"t{i}" for i in range(3 * MAX_RETRIES)}
    for task_id in tasks:
        core.handle(submitted(task_id, deadline=2000.0))
    while {task_id for task_id, _ in policy.asked} < tasks:
        core.decide(0)
    policy.asked.clear()

    def beat(at: float) -> None:
        core.handle(Heartbeat(at=at, node="n", boot="n.1", counters=Counters()))
        core.decide(at)

    for second in range(1, 4):
        beat(float(second))
    assert sorted(task_id for task_id, _ in policy.asked) == sorted(tasks)
    policy.asked.clear()
    core.handle(submitted("t99"))
    core.handle(Dispatched(at=4.0, id="t99", node="n", attempt=1, model="m"))
    beat(5.0)
    assert policy.asked == []


def test_parked_tasks_are_asked_about_only_with_cause() -> None:
    policy = Scripted(Wait(until=50.0))
    core = core_with(policy, info("n", slots=8))
    for i in range(10):
        core.handle(submitted(f"t{i}"))
    for _ in range(10):
        core.decide(0)
    assert len(policy.asked) == 10  # each once
    for now in range(1, 20):
        core.decide(now)
    assert len(policy.asked) == 10  # nothing happened, nobody asked
    policy.answer = None
    core.handle(submitted("new", at=20))
    core.decide(20)
    assert len(policy.asked) == 11  # the new one alone
    core.handle(completed("new", "n", 21))
    assert len(core.decide(21)) == 10  # room appeared


def test_of_the_parked_the_most_promising_are_tried_and_few_in_vain() -> None:
    policy = Scripted()
    core = core_with(policy, info("n", slots=8))
    core.handle(submitted("running"))
    core.decide(0)
    for i, rank in enumerate((1.0, 5.0, 3.0, 4.0)):
        policy.answer = Wait(until=50.0, rank=rank)
        core.handle(submitted(f"t{i}"))
        core.decide(0)
    policy.asked.clear()
    core.handle(completed("running", "n", 1))
    core.decide(1)
    assert [task_id for task_id, _ in policy.asked] == ["t1"]
    assert len(policy.asked) == MAX_RETRIES


def test_parked_tasks_wake_by_themselves() -> None:
    policy = Scripted(Wait(until=50.0))
    core = core_with(policy, info("n"))
    core.handle(submitted("t"))
    core.decide(0)
    policy.answer = None
    assert core.decide(49) == []
    assert [d.action for d in core.decide(50)] == ["dispatch"]


def test_a_task_is_not_asked_about_before_it_may_start() -> None:
    policy = Scripted()
    core = core_with(policy, info("n"))
    core.handle(submitted("t", start_after=50.0))
    assert core.decide(49.9) == []
    assert policy.asked == []
    assert [d.action for d in core.decide(50.0)] == ["dispatch"]
    core.handle(Returned(id="t", at=51.0, node="n", attempt=1, cause="handed_back"))
    assert [d.action for d in core.decide(51.0)] == ["dispatch"]


def test_a_round_is_bounded_whatever_waits() -> None:
    for answer, most in ((Wait(until=1e9), MAX_LONG_WAITS), (Wait(until=0.3), LOOKAHEAD), (Wait(), LOOKAHEAD)):
        policy = Scripted(answer)
        core = core_with(policy, info("n", slots=8))
        for i in range(5 * LOOKAHEAD):
            core.handle(submitted(f"t{i}", deadline=1e9 + i))
        core.decide(0)
        assert len(policy.asked) == most
        core.handle(submitted("urgent", deadline=5))
        core.decide(0)
        assert policy.asked[most][0] == "urgent"


def test_work_for_a_full_model_does_not_stand_before_other_work() -> None:
    policy = Scripted()
    core = core_with(policy, info("a", slots=1, models=("x",)), info("b", slots=1, models=("y",)))
    for i in range(3 * LOOKAHEAD):
        core.handle(submitted(f"x{i}", deadline=10, model="x"))
    core.handle(submitted("y", deadline=1000, model="y"))
    assert "y" in [d.task.id for d in core.decide(0)]


def test_a_waiting_task_without_a_time_is_asked_about_every_round() -> None:
    policy = Scripted(Wait())
    core = core_with(policy, info("n"))
    core.handle(submitted("t"))
    for now in range(3):
        core.decide(now)
    assert len(policy.asked) == 3


def test_expired_tasks_leave_even_where_no_node_serves_them() -> None:
    core = core_with(Scripted(), info("n", models=("x",)))
    core.handle(submitted("t", deadline=5, model="nowhere"))
    assert core.decide(4) == []
    assert [d.action for d in core.decide(5)] == ["expire"]
    assert len(core.pending) == 0


def test_a_task_is_not_sent_to_a_node_that_lost_it_while_others_serve_it() -> None:
    policy = Scripted()
    core = core_with(policy, info("a"), info("b"))
    core.handle(submitted("t"))
    (first,) = core.decide(0)
    assert first.node is not None
    assert first.node.name == "a"
    core.handle(Returned(id="t", node="a", attempt=1, at=1, cause="lease_expired", strikes=1))
    (second,) = core.decide(1)
    assert second.node is not None
    assert second.node.name == "b"
    core.handle(NodeDown(at=2, node="b"))
    core.handle(Returned(id="t", node="b", attempt=2, at=2, cause="lease_expired", strikes=2))
    (third,) = core.decide(2)
    assert third.node is not None
    assert third.node.name == "a"  # nobody else


def test_a_full_alternative_is_waited_for_only_so_long() -> None:
    core = core_with(Scripted(), info("a"), info("b", slots=1, models=("m", "x")))
    for n in range(9):
        core.handle(submitted(f"filler-{n}", model="x"))
    core.handle(submitted("t"))
    assert {d.task.id: d.node.name for d in core.decide(0) if d.node}["t"] == "a"
    core.handle(Returned(id="t", node="a", attempt=1, at=1, cause="failed", strikes=1))
    assert core.decide(1) == core.decide(AVOID_SECONDS) == []
    (again,) = core.decide(1 + AVOID_SECONDS)
    assert again.node is not None
    assert (again.task.id, again.node.name) == ("t", "a")


def test_too_long_for_every_context_is_rejected_and_too_long_for_some_goes_elsewhere() -> None:
    core = core_with(Scripted(), info("small", context=100), info("large", context=4096))
    core.handle(submitted("huge", prompt_tokens=100_000))
    core.handle(submitted("long", prompt_tokens=1000))
    decisions = {d.task.id: d for d in core.decide(0)}
    assert decisions["huge"].action == "reject"
    assert "4096" in decisions["huge"].explanation.sentence
    assert decisions["long"].node is not None
    assert decisions["long"].node.name == "large"


def test_a_context_must_hold_max_tokens_unless_the_answer_may_end_with_it() -> None:
    core = core_with(Scripted(), info("small", context=1000), info("large", context=9000))
    core.handle(submitted("said", prompt_tokens=100, max_tokens=4096))
    core.handle(submitted("not-said", prompt_tokens=100, max_tokens=4096, fit_context=True))
    decided = {d.task.id: d for d in core.decide(0)}
    assert {i: d.node.name for i, d in decided.items() if d.node} == {"said": "large", "not-said": "small"}
    notes = {c.node: c.note for c in decided["said"].explanation.candidates if not c.feasible}
    assert notes == {"small": "its context of 1000 tokens is too short"}


TOOLS, BOTH = ("generate", "tools"), ("generate", "logprobs", "tools")


def test_what_a_task_needs_no_score_outweighs() -> None:
    policy = Scripted()
    core = core_with(
        policy,
        info("plain", capabilities=("generate",)),
        info("able", capabilities=TOOLS, models=("plain-too", "toolsmith")),
        info("ablest", capabilities=BOTH),
    )
    core.handle(submitted("t", needs=TOOLS))
    core.handle(submitted("named", needs=TOOLS, model="toolsmith"))
    core.handle(submitted("both", needs=BOTH))
    decided = {d.task.id: d for d in core.decide(0)}
    assert dict(policy.asked) == {"t": ("able", "ablest"), "named": ("able",), "both": ("ablest",)}
    assert decided["named"].model == "toolsmith"
    notes = {c.node: c.note for c in decided["both"].explanation.candidates if not c.feasible}
    assert notes == {"plain": "cannot do: logprobs, tools", "able": "cannot do: logprobs"}


def test_any_model_is_the_one_of_the_node_that_can() -> None:
    two = info("n", models=("writer",), capabilities=("generate",))
    embedder = info("n", models=("embedder",), capabilities=("embeddings",)).models
    core = core_with(Scripted(), two.model_copy(update={"models": (*two.models, *embedder)}))
    core.handle(submitted("text", needs=("generate",)))
    core.handle(submitted("vector", needs=("embeddings",)))
    assert {d.task.id: d.model for d in core.decide(0)} == {"text": "writer", "vector": "embedder"}


def test_work_that_waits_for_an_able_node_does_not_stand_before_other_work() -> None:
    core = core_with(Scripted(), info("able", slots=1, capabilities=TOOLS), info("plain", capabilities=("generate",)))
    for i in range(3 * LOOKAHEAD):
        core.handle(submitted(f"t{i}", deadline=10, needs=TOOLS))
    core.handle(submitted("t", deadline=1000, needs=("generate",)))
    assert "t" in [d.task.id for d in core.decide(0)]


def test_what_no_live_node_can_do_is_refused_with_a_sentence() -> None:
    core = core_with(Scripted())
    for i in range(MAX_REFUSED + 1):
        core.handle(submitted(f"t{i}", deadline=1000, needs=TOOLS))
    assert core.decide(0) == core.decide(500) == []  # no node is live: they wait
    core.handle(NodeUp(at=500, info=info("plain", capabilities=("generate",))))
    core.handle(submitted("other", deadline=1000, needs=("generate",)))
    assert [d.task.id for d in core.decide(500)] == ["other"]
    assert core.decide(500 + 0.9 * AWAIT_NODES) == []  # another may just be starting
    refused = core.decide(500 + AWAIT_NODES)
    assert len(refused) == MAX_REFUSED
    assert {d.action for d in refused} == {"reject"}
    assert refused[0].explanation.sentence.startswith("tools: no node has offered it; start one whose model can")
    assert len(core.decide(500 + AWAIT_NODES)) == 1
    assert len(core.pending) == 0


def test_a_node_that_went_is_waited_for_and_then_named() -> None:
    core = core_with(Scripted(), info("plain", capabilities=("generate",)), info("able", capabilities=TOOLS))
    core.handle(submitted("t", deadline=5000, needs=TOOLS))
    core.decide(0)
    core.handle(NodeDown(at=1, node="able"))
    core.handle(Returned(id="t", node="able", attempt=1, at=1, cause="lease_expired", strikes=1))
    assert core.decide(1) == core.decide(AWAIT_RETURN) == []
    (refused,) = core.decide(1 + AWAIT_RETURN)
    assert refused.explanation.sentence == "tools: offered by m; no live node serves it"
    core.handle(submitted("u", at=700, deadline=5000, needs=TOOLS))
    core.handle(NodeUp(at=700, info=info("able", capabilities=TOOLS)))
    assert [d.action for d in core.decide(700)] == ["dispatch"]


def test_a_new_leader_waits_for_nodes_it_only_heard_of() -> None:
    core = core_with(Scripted(), info("plain", capabilities=("generate",)))
    core.remember(info("able", capabilities=TOOLS), at=-5)
    core.handle(submitted("t", deadline=5000, needs=TOOLS))
    assert core.decide(0) == core.decide(2 * AWAIT_NODES) == []


def test_many_demands_cost_a_round_what_their_nodes_do() -> None:
    """A tenant that asks for ever other things gets no more turns by it."""
    policy = Scripted(Wait())
    needs = [tuple(sorted({"generate", *combination})) for combination in combinations(ODD, 3)]
    core = core_with(policy, info("n", slots=1000, capabilities=("generate", *ODD)))
    for i, each in enumerate(needs * 10):
        core.handle(submitted(f"t{i}", needs=each))
    core.decide(0)
    assert len(policy.asked) == LOOKAHEAD


ODD = ("chat", "choices", "grammar", "json_schema", "logit_bias", "logprobs", "tokens", "tools")


def test_a_refused_decision_is_forgotten_and_a_taken_back_one_is_pending_again() -> None:
    core = core_with(Scripted(), info("a"), info("b"))
    core.handle(submitted("t"))
    core.handle(submitted("u"))
    first, second = core.decide(0)
    core.forget(first.task)
    assert core.find(first.task.id) is None
    core.take_back(second.task)
    assert "a" not in core.cluster.nodes
    (again,) = core.decide(1)
    assert again.task.id == second.task.id
    assert again.task.attempt == 1
    assert again.node is not None
    assert again.node.name == "b"


def test_a_node_version_tells_every_change() -> None:
    core = core_with(Scripted(), info("a"))
    node = core.cluster.nodes["a"]
    seen = [node.version]

    def changed() -> bool:
        seen.append(node.version)
        return seen[-1] != seen[-2]

    core.handle(submitted("t"))
    assert not changed()
    core.decide(1)
    assert changed()
    assert node.changed == 1
    core.handle(Dispatched(id="t", node="a", model="m", attempt=1, at=1.1))
    assert not changed()  # known already
    core.handle(Heartbeat(at=2, node="a", boot="a.1", counters=node.counters, progress={"t": 3}))
    assert changed()
    assert node.in_flight["t"].generated == 3
    core.handle(completed("t", "a", 3))
    assert changed()
    assert node.changed == 3


def test_rejecting_removes_and_says_why() -> None:
    core = core_with(Scripted(Reject("no use")), info("a"))
    core.handle(submitted("t"))
    (decision,) = core.decide(0)
    assert (decision.action, decision.explanation.sentence) == ("reject", "no use")
    assert len(decision.explanation.candidates) == 1
    assert core.find("t") is None


def test_without_explanations_nothing_is_explained() -> None:
    core = SchedulerCore(Scripted(), explain=False)
    core.handle(NodeUp(at=0, info=info("a")))
    core.handle(submitted("t"))
    (decision,) = core.decide(0)
    assert decision.explanation.candidates == ()


def test_a_task_the_policy_fails_on_is_rejected_and_the_others_are_placed() -> None:
    class Allergic(Scripted):
        def choose(self, task: Task, candidates: Sequence[Node], cluster: Cluster, now: float) -> Choice:
            if task.id == "bad":
                raise ZeroDivisionError("of this one")
            return super().choose(task, candidates, cluster, now)

    for reject_on_error in (True, False):
        core = SchedulerCore(Allergic(), reject_on_error=reject_on_error)
        core.handle(NodeUp(at=0.0, info=info("a", slots=4)))
        for task_id in ("first", "bad", "last"):
            core.handle(submitted(task_id))
        if not reject_on_error:
            with pytest.raises(ZeroDivisionError):
                core.decide(1.0)
            continue
        decisions = {d.task.id: d for d in core.decide(1.0)}
        assert {i: d.action for i, d in decisions.items()} == {"first": "dispatch", "bad": "reject", "last": "dispatch"}
        assert decisions["bad"].failure
        assert decisions["bad"].explanation.sentence == "the policy failed on it: ZeroDivisionError: of this one"
        assert core.decide(2.0) == []


@pytest.mark.parametrize("snapshot", [{}, {"policy": "scripted", "state": {}}, {"format": -1, "policy": "scripted"}])
def test_a_snapshot_of_another_release_is_refused(snapshot: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="format"):
        core_with(Scripted()).restore(snapshot)


def test_its_own_snapshot_is_taken_and_another_policys_refused() -> None:
    core = core_with(Scripted())
    core.restore(core.snapshot())
    with pytest.raises(ValueError, match="of policy 'another'"):
        core.restore(core.snapshot() | {"policy": "another"})
