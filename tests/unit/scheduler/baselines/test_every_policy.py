"""The baselines: each does what its name says, and its snapshot makes decisions repeat."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from perllm.broker.errors import BadSetting
from perllm.broker.messages import (
    Completed,
    Counters,
    Energy,
    ModelOffer,
    NodeInfo,
    Power,
    Receipt,
    State,
    StepCost,
    Submitted,
)
from perllm.scheduler.baselines.calibrated_forecast import forecast
from perllm.scheduler.baselines.cs_ucb_paper import CsUcbPaper
from perllm.scheduler.baselines.fine_infer import FineInfer
from perllm.scheduler.baselines.lin_ucb import LinUcb
from perllm.scheduler.baselines.mean_length import MeanLength
from perllm.scheduler.core.cluster import Cluster, Node, Task
from perllm.scheduler.core.policy import Place, Policy, Reject, Wait
from perllm.scheduler.policies import make_policy, policy_names

PLAIN = [name for name in policy_names() if name != "agod" or find_spec("torch")]
ALL = [*PLAIN, *(f"{name}+mech" for name in PLAIN if name != "cs-ucb")]


def node(
    name: str, *, tier: Any = "edge", step: float = 0.05, slots: int = 4, watts: float = 40, held: int = 0
) -> Node:
    info = NodeInfo(
        name=name,
        tier=tier,
        boot="b",
        slots=slots,
        models=(
            ModelOffer(
                name="m",
                context=4096,
                kv_tokens=8192,
                calibration=StepCost(step=step, sequence=step / 20, prefill=step / 50),
            ),
        ),
        power=Power(idle=10, active=watts, joules_per_byte=1e-7, method="cpu-model", estimated=True),
        bandwidth=1e7,
        engine="test",
    )
    made = Node(info, since=0.0)
    for i in range(held):
        flight = task(f"{name}-{i}")
        flight.node, flight.dispatched = name, 0.0
        made.in_flight[flight.id] = flight
    return made


def task(name: str = "t", *, left: float = 5.0, prompt: int = 200, service: str = "s", payload: int = 1000) -> Task:
    return Task(
        id=name,
        submitted=0.0,
        deadline=left,
        value=1.0,
        service=service,
        model=None,
        prompt_tokens=prompt,
        payload_bytes=payload,
        max_tokens=100,
    )


def completed(
    t: Task, where: str, *, at: float, joules: float = 10.0, tokens: int = 50, cut: bool = False
) -> Completed:
    return Completed(
        at=at,
        id=t.id,
        node=where,
        attempt=1,
        state=State.EXPIRED if cut else State.SUCCEEDED,
        on_time=not cut and at <= t.deadline,
        latency=at - t.submitted,
        queued=0.0,
        receipt=Receipt(
            node=where,
            model="m",
            attempt=1,
            prompt_tokens=t.prompt_tokens,
            completion_tokens=tokens,
            energy=Energy(inference=joules, method="cpu-model", estimated=True),
            before=Counters(),
            after=Counters(),
        ),
    )


def cluster(*nodes: Node) -> Cluster:
    return Cluster({n.name: n for n in nodes})


def feed(policy: Policy, where: Cluster, name: str, *, at: float, joules: float = 10.0, **task_args: Any) -> None:
    """One task placed on `name` at time 0 and completed at `at`."""
    t = task(f"fed-{id(task_args)}-{at}-{name}-{joules}", **task_args)
    t.node, t.dispatched, t.attempt = name, 0.0, 1
    policy.observe(completed(t, name, at=at, joules=joules), t, where)


def placed(policy: Policy, t: Task, where: Cluster, now: float = 0.0) -> str:
    choice = policy.choose(t, list(where.nodes.values()), where, now)
    assert isinstance(choice, Place), choice
    return choice.node


def test_round_robin_takes_turns_and_least_loaded_counts_per_slot() -> None:
    three = cluster(node("a", held=1), node("b", held=2, slots=16), node("c", held=2))
    robin = make_policy("round-robin")
    assert [placed(robin, task(str(i)), three) for i in range(4)] == ["a", "b", "c", "a"]
    assert placed(make_policy("least-loaded"), task(), three) == "b"


def test_power_of_two_never_takes_the_fullest_of_three() -> None:
    three = cluster(node("a"), node("b", held=3), node("c", held=1))
    policy = make_policy("power-of-two", 3)
    seen = {placed(policy, task(str(i)), three) for i in range(100)}
    assert seen == {"a", "c"}


def test_one_tier_waits_while_its_tier_has_no_room() -> None:
    both = cluster(node("e"), node("c", tier="cloud"))
    assert placed(make_policy("edge-only"), task(), both) == "e"
    assert placed(make_policy("cloud-only"), task(), both) == "c"
    assert make_policy("cloud-only").choose(task(), [both.nodes["e"]], both, 0.0) == Wait()


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


@pytest.mark.parametrize("name", ["ucb1", "thompson", "linucb", "cs-ucb-paper", "rewardless-guidance"])
def test_what_learns_comes_to_prefer_the_node_that_is_on_time(name: str) -> None:
    two = cluster(node("good"), node("bad"))
    policy = make_policy(name, 1)
    counts = {"good": 0, "bad": 0}
    for i in range(300):
        t = task(str(i))
        where = placed(policy, t, two)
        counts[where] += i >= 200
        t.node, t.dispatched, t.attempt = where, 0.0, 1
        policy.observe(completed(t, where, at=2.0 if where == "good" else 7.0), t, two)
    assert counts["good"] > 75


def test_linucb_learns_from_the_queue_it_saw() -> None:
    """The same node is good while short and bad while long: only features can tell."""
    policy = make_policy("linucb", 1)
    for i in range(200):
        full = i % 2 == 1
        where = cluster(node("a", held=8 if full else 0))
        t = task(str(i))
        placed(policy, t, where)
        t.node, t.dispatched, t.attempt = "a", 0.0, 1
        policy.observe(completed(t, "a", at=7.0 if full else 2.0), t, where)
    assert isinstance(policy, LinUcb)
    short, long = (policy.index("a", np.array(policy.x(task(), node("a", held=h), 0.0))) for h in (0, 8))
    assert short > 0.9
    assert long < 0.4


def test_the_forecast_is_the_calibration_for_a_task_alone_and_grows_with_the_queue() -> None:
    lengths = MeanLength({"s": [1e9, 40e9]})  # mean of 40, beyond doubt
    n = node("a")
    cal = n.info.models[0].calibration
    alone = forecast(n, task(payload=1_000_000), lengths)
    assert alone.alone == pytest.approx(0.1 + 200 * cal.prefill + 40 * (cal.step + cal.sequence), rel=1e-6)
    finishes = [forecast(node("a", held=h), task(), lengths).finish for h in range(10)]
    assert finishes == sorted(finishes)
    assert finishes[9] > 2 * finishes[3]  # a full turn of the slots later


def test_cheapest_feasible_pays_only_for_what_the_deadline_needs() -> None:
    slow_cheap, fast_dear = node("slow", step=0.05, watts=5), node("fast", tier="cloud", step=0.01, watts=400)
    two = cluster(slow_cheap, fast_dear)
    policy = make_policy("cheapest-feasible")
    for _ in range(20):
        feed(policy, two, "slow", at=1.0)
    assert placed(policy, task(left=30.0), two) == "slow"
    assert placed(policy, task(left=2.0), two) == "fast"
    assert placed(policy, task(left=0.1), two) == "fast"  # none is in time: the earliest
    assert placed(make_policy("earliest-completion"), task(left=30.0), two) == "fast"


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


# --- CS-UCB as published, by hand


def test_cs_ucb_paper_tries_untried_servers_first_then_the_index() -> None:
    two = cluster(node("a"), node("b"))
    policy = CsUcbPaper()
    assert placed(policy, task("1"), two) == "a"
    feed(policy, two, "a", at=1.0, joules=10)
    assert placed(policy, task("2"), two) == "b"
    feed(policy, two, "b", at=2.0, joules=20)
    # f = min(deadline slack, compute slack of 5/6 at placement or 1 unknown); E_norm = the largest energy so far
    a, b = policy.arms["s", "a"], policy.arms["s", "b"]
    assert a.reward == pytest.approx(min(0.8, 5 / 6, 1) - 10 / 10)
    assert b.reward == pytest.approx(0.6 - 20 / 20)
    looks = {c.node: c for c in policy.explain(task("3"), list(two.nodes.values()), two, 0.0)}
    bonus = 0.5 * math.sqrt(math.log(2) / 1)
    assert looks["a"].index == pytest.approx(-0.2 + bonus)
    assert looks["a"].confidence == pytest.approx(bonus)
    assert looks["b"].slacks == pytest.approx({"deadline": 0.6, "compute": 5 / 6, "bandwidth": 1 - 200 / 1e7})
    assert placed(policy, task("3"), two) == "a"


def test_cs_ucb_paper_penalises_only_where_no_server_is_feasible() -> None:
    two = cluster(node("a"), node("b"))
    policy = CsUcbPaper()
    for _ in range(3):
        feed(policy, two, "a", at=4.0, joules=1)  # slow and cheap: a better mean reward than b's
        feed(policy, two, "b", at=1.0, joules=100)
    assert policy.arms["s", "a"].reward > policy.arms["s", "b"].reward
    assert placed(policy, task(left=5.0), two) == "a"
    assert placed(policy, task(left=2.0), two) == "b"  # a is infeasible: D̂ = 4 s
    looks = {c.node: c for c in policy.explain(task(left=0.5), list(two.nodes.values()), two, 0.0)}
    assert not looks["a"].feasible
    assert not looks["b"].feasible
    plain = policy.arms["s", "a"].reward + looks["a"].confidence  # type: ignore[operator]
    assert looks["a"].index == pytest.approx(plain + (0.5 - 4.0) / 0.5)
    assert "short of deadline" in looks["a"].note
    assert placed(policy, task(left=0.5), two) == "b"


def test_cs_ucb_paper_keeps_to_feasible_servers_whatever_their_index() -> None:
    two = cluster(node("a"), node("b"))
    policy = CsUcbPaper(theta=0.0)  # so that only feasibility speaks against the better index
    for _ in range(3):
        feed(policy, two, "a", at=4.0, joules=1)
        feed(policy, two, "b", at=1.0, joules=100)
    looks = {c.node: c.index for c in policy.explain(task(left=2.0), list(two.nodes.values()), two, 0.0)}
    assert looks["a"] > looks["b"]  # type: ignore[operator]
    assert placed(policy, task(left=2.0), two) == "b"
    assert placed(policy, task(left=0.5), two) == "a"  # none is feasible: the index alone


def test_cs_ucb_paper_counts_work_in_flight() -> None:
    policy = CsUcbPaper()
    full = cluster(node("a", held=6), node("b", held=5))
    looks = {c.node: c for c in policy.explain(task(), list(full.nodes.values()), full, 0.0)}
    assert looks["a"].slacks["compute"] == pytest.approx(-1 / 6)
    assert looks["b"].slacks["compute"] == 0
    heavy = task(payload=60_000_000)
    looks = {c.node: c for c in policy.explain(heavy, list(full.nodes.values()), full, 0.0)}
    assert looks["a"].slacks["bandwidth"] == pytest.approx(1 - (60e6 / 5 + 6 * 1000 / 5) / 1e7)
    for flight in full.nodes["a"].in_flight.values():
        flight.claimed = 0.1  # here already: the link is free of it
    looks = {c.node: c for c in policy.explain(heavy, list(full.nodes.values()), full, 0.0)}
    assert looks["a"].slacks["bandwidth"] == pytest.approx(1 - 60e6 / 5 / 1e7)


def test_cs_ucb_paper_holds_a_cut_task_against_its_server() -> None:
    policy = CsUcbPaper()
    one = cluster(node("a"))
    t = task()
    t.node, t.dispatched = "a", 0.0
    policy.observe(completed(t, "a", at=5.0, joules=10, cut=True), t, one)
    assert policy.arms["s", "a"].delay == pytest.approx(10.0)
    assert policy.arms["s", "a"].reward == pytest.approx(-1 - 1)


# --- all of them


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
    looks = policy.explain(task(), list(nodes.nodes.values()), nodes, 0.0)
    assert [c.node for c in looks] == ["a", "b"]
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
        where = placed(policy, t, two)
        chosen.append(where)
        t.node, t.dispatched, t.attempt = where, 0.0, 1
        policy.observe(completed(t, where, at=1.0 if where == "good" else 7.0), t, two)
    assert chosen[-500:].count("good") > 450
    second = make_policy("agod", 2)
    second.restore(json.loads(json.dumps(policy.snapshot())))
    tasks = [task(str(i)) for i in range(50)]
    assert [placed(second, t, two) for t in tasks] == [placed(policy, t, two) for t in tasks]


def test_events_of_tasks_never_placed_are_harmless() -> None:
    nodes = cluster(node("a"))
    event = Submitted(at=0.0, id="x", deadline=5.0)
    for name in ALL:
        policy = make_policy(name)
        policy.observe(event, None, nodes)
        policy.observe(completed(task("y"), "gone", at=1.0), None, nodes)
