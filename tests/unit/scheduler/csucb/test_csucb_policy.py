"""The default policy as a whole: what it prefers, when it waits or refuses, what it says, that it can be resumed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perllm.broker.messages import (
    Claimed,
    Completed,
    Counters,
    Dispatched,
    Ended,
    Heartbeat,
    NodeDown,
    NodeInfo,
    NodeUp,
    Power,
    Returned,
    State,
    StepCost,
    Submitted,
)
from perllm.scheduler.core.scheduler import Decision, SchedulerCore
from perllm.scheduler.csucb.policy import CsUcb, Mechanisms
from perllm.scheduler.examples import completed, node_info, submitted


def info(name: str, *, step: float = 0.02, watts: float = 100.0, slots: int = 4, **fields: Any) -> NodeInfo:
    return node_info(
        name,
        slots=slots,
        step_cost=StepCost(step=step, sequence=fields.pop("sequence", step / 20), prefill=step / 100),
        power=Power(idle=10, active=watts, method="emulated", estimated=True),
        **{"bandwidth": 1e8} | fields,
    )


def core_with(*infos: NodeInfo, **options: Any) -> SchedulerCore:
    core = SchedulerCore(CsUcb(**options))
    for one in infos:
        core.handle(NodeUp(at=0.0, info=one))
    return core


def submit(core: SchedulerCore, task_id: str, now: float, left: float = 10.0, **fields: Any) -> list[Decision]:
    core.handle(submitted(task_id, at=now, left=left, **fields))
    return settle(core, now)


def settle(core: SchedulerCore, now: float) -> list[Decision]:
    """Decide, and confirm what was decided as the stream would."""
    decisions = core.decide(now)
    for d in decisions:
        if d.node is not None:
            placed = {"id": d.task.id, "node": d.node.name, "attempt": d.task.attempt}
            core.handle(Dispatched(at=now, model="m", **placed))
            core.handle(Claimed(at=now + 0.004, **placed))
    return decisions


def finish(
    core: SchedulerCore,
    task_id: str,
    now: float,
    tokens: int,
    before: Counters,
    after: Counters,
    *,
    joules: float = 30.0,
) -> Completed:
    task = core.find(task_id)
    assert task is not None
    assert task.node is not None
    event = completed(
        task_id,
        task.node,
        at=now,
        attempt=task.attempt,
        joules=joules,
        payload_bytes=1000,
        transfer=0.001,
        prompt_tokens=50,
        completion_tokens=tokens,
        before=before,
        after=after,
    )
    core.handle(event)
    return event


def where(decisions: list[Decision]) -> str | None:
    (decision,) = decisions
    return decision.node.name if decision.node else None


def test_of_equals_the_cheaper_and_in_need_the_faster() -> None:
    nodes = (info("dear", step=0.01, watts=150.0), info("cheap", step=0.02, watts=50.0))
    assert where(submit(core_with(*nodes), "t", 1.0, left=30.0)) == "cheap"
    assert where(submit(core_with(*nodes, value_weight=6.0), "t", 1.0, left=0.8, max_tokens=60)) == "dear"


def test_harm_to_those_already_there_counts() -> None:
    """Sequences cost as much as steps and there is little time: the node with a task on it looks worse for its sake."""
    index: dict[bool, dict[str, float | None]] = {}
    for harm in (True, False):
        nodes = (info("taken", sequence=0.02, watts=50.0), info("empty", sequence=0.02, watts=60.0))
        core = core_with(*nodes, mechanisms=Mechanisms(harm=harm, foresight=False, price=False))
        assert where(submit(core, "first", 1.0, left=1.5, max_tokens=80)) == "taken"
        (second,) = submit(core, "second", 1.0, left=1.5, max_tokens=80)
        index[harm] = {c.node: c.index for c in second.explanation.candidates}
    assert index[True]["empty"] == index[False]["empty"]
    assert index[True]["taken"] is not None
    assert index[False]["taken"] is not None
    assert index[True]["taken"] < index[False]["taken"] - 0.05


def test_a_node_that_stands_still_gets_nothing_until_it_moves() -> None:
    core = core_with(info("a", watts=10.0), info("b", watts=500.0))
    still = Counters(steps=10, busy=0.3, active=1, since_progress=2.0, longest_step=0.1)
    core.handle(Heartbeat(at=2.0, node="a", boot="a.1", counters=still))
    assert where(submit(core, "t", 2.1)) == "b"
    core.handle(
        Heartbeat(at=3.0, node="a", boot="a.1", counters=still.model_copy(update={"since_progress": 0.0, "steps": 20}))
    )
    assert where(submit(core, "u", 3.1)) == "a"


def test_when_all_nodes_stand_still_tasks_wait() -> None:
    core = core_with(info("a"))
    still = Counters(steps=10, busy=0.3, active=1, since_progress=9.0, longest_step=0.1)
    core.handle(Heartbeat(at=2.0, node="a", boot="a.1", counters=still))
    core.cluster.nodes["a"].in_flight["other"] = core.pending.get("none") or _in_flight(core)
    assert submit(core, "t", 2.1) == []
    assert core.find("t") is not None


def _in_flight(core: SchedulerCore) -> Any:
    core.handle(Submitted(id="other", at=0.0, deadline=99.0))
    task = core.pending.get("other")
    core.pending.remove("other")
    return task


def test_pessimism_at_cold_start_does_not_reject_for_ever() -> None:
    """The node announces steps a hundred times too slow: it must still be tried, and then believed to be fast."""
    core = core_with(info("a", step=2.0))
    counters, now, placed = Counters(), 1.0, 0
    for i in range(60):
        now += 0.5
        decisions = submit(core, f"t{i}", now, left=3.0)
        assert all(d.action != "reject" for d in decisions)
        for d in decisions:
            if d.action != "dispatch":
                continue
            placed += 1
            before = counters
            counters = Counters(
                steps=before.steps + 40,
                busy=before.busy + 0.8,
                sequence_steps=before.sequence_steps + 40,
                prefilled=before.prefilled + 50,
                context_steps=before.context_steps + 40 * 70,
                generated=before.generated + 40,
                longest_step=0.02,
            )
            now += 0.9
            finish(core, d.task.id, now, 40, before, counters)
    assert placed >= 40


def test_what_no_idle_node_could_do_is_refused_with_the_reason() -> None:
    """By a node that is known well, and only then."""
    core = core_with(info("a", step=0.05))
    counters = Counters()
    for i in range(30):
        counters = Counters(
            steps=counters.steps + 20,
            busy=counters.busy + 1.05,
            sequence_steps=counters.sequence_steps + 20,
            context_steps=0,
            longest_step=0.06,
        )
        core.handle(Heartbeat(at=1.0 + i, node="a", boot="a.1", counters=counters))
    (decision,) = submit(core, "t", 31.0, left=0.02)
    assert decision.action == "reject"
    assert "too little" in decision.explanation.sentence


def test_long_deadlines_wait_in_the_pool_and_never_in_a_node_queue() -> None:
    core = core_with(info("a", slots=4))
    for i in range(20):
        submit(core, f"t{i}", 1.0, left=86_400.0)
    assert 1 <= len(core.cluster.nodes["a"].in_flight) <= 4
    assert len(core.pending) == 20 - len(core.cluster.nodes["a"].in_flight)


def test_a_lone_long_task_does_not_wait_on_an_idle_node_for_its_energy() -> None:
    """After many tiny tasks, one costs hundreds of their energies; nothing is won by putting it off."""
    core = core_with(info("a"), info("b"))
    now, counters = 1.0, Counters()
    for i in range(200):
        now += 0.2
        assert where(submit(core, f"t{i}", now, left=60.0, max_tokens=2)) is not None
        finish(core, f"t{i}", now + 0.1, 2, counters, counters, joules=0.5)
    assert where(submit(core, "long", now + 1.0, left=60.0, max_tokens=4000)) is not None


def lose(core: SchedulerCore, task_id: str, node: str, at: float) -> None:
    core.handle(Returned(at=at, id=task_id, node=node, attempt=1, cause="failed", reason="died", strikes=1))


def test_no_task_waits_for_a_node_it_may_not_go_to() -> None:
    """It failed on the cheap node: what it would cost there is no reason to wait."""
    core = core_with(info("cheap", watts=10.0), info("dear", watts=500.0), energy_scale=10.0)
    assert where(submit(core, "t", 1.0, left=600.0)) == "cheap"
    lose(core, "t", "cheap", 2.0)
    assert where(settle(core, 2.1)) == "dear"


def test_a_long_task_lost_by_the_only_node_goes_back_to_it_at_once() -> None:
    """What it costs there must be paid anyway: it is no reason to put it off."""
    core = core_with(info("only"), energy_scale=10.0)
    assert where(submit(core, "t", 1.0, left=600.0, max_tokens=4000)) == "only"
    lose(core, "t", "only", 2.0)
    assert where(settle(core, 2.1)) == "only"


def test_a_lost_task_goes_back_where_no_other_node_can_make_its_deadline() -> None:
    core = core_with(info("slow", step=2.0))
    assert where(submit(core, "first", 1.0, left=600.0, max_tokens=20)) == "slow"  # it is not idle, to be tried out
    core.handle(NodeUp(at=1.0, info=info("fast")))
    assert where(submit(core, "t", 2.0, left=20.0, expected_tokens=150)) == "fast"
    lose(core, "t", "fast", 3.0)
    assert where(settle(core, 3.1)) == "fast"


def test_a_node_that_takes_no_time_at_all_takes_every_task() -> None:
    """As an emulated one says of itself: its forecast must not end before a task could reach it."""
    core = core_with(info("instant", step=0.0, slots=16))
    for i in range(8):
        assert where(submit(core, f"t{i}", 1.0 + 0.01 * i, left=60.0)) == "instant"


def test_memory_spoken_for_is_not_promised_again() -> None:
    core = core_with(info("small", kv_tokens=400, watts=100.0), info("large", watts=200.0))
    assert where(submit(core, "t", 1.0, left=5.0, prompt_tokens=250)) == "small"
    assert where(submit(core, "u", 1.0, left=5.0, prompt_tokens=250)) == "large"


def test_nobody_waits_for_a_node_that_takes_up_nothing() -> None:
    core = core_with(info("cheap", kv_tokens=400, watts=100.0), info("dear", watts=300.0))
    assert where(submit(core, "first", 1.0, prompt_tokens=250)) == "cheap"
    core.distrust("cheap", "it took up nothing", 1.0)
    assert where(submit(core, "patient", 1.0, left=300.0, prompt_tokens=250)) == "dear"


def test_who_has_time_waits_for_room_on_a_node_that_is_cheaper_and_soon_enough() -> None:
    """And goes where there is room when it has not, or when that node is gone."""
    core = core_with(info("cheap", kv_tokens=400, watts=100.0), info("dear", watts=300.0))
    assert where(submit(core, "first", 1.0, prompt_tokens=250)) == "cheap"
    assert submit(core, "patient", 1.0, left=300.0, prompt_tokens=250) == []
    assert where(submit(core, "urgent", 1.0, left=3.0, prompt_tokens=250)) == "dear"
    finish(core, "first", 3.0, 40, Counters(), Counters())
    assert where(settle(core, 3.0)) == "cheap"
    assert submit(core, "other", 3.1, left=300.0, prompt_tokens=250) == []
    core.handle(NodeDown(at=4.0, node="cheap", reason="gone"))
    assert where(settle(core, 4.0)) == "dear"


def test_nobody_waits_for_a_node_that_could_never_hold_the_task() -> None:
    core = core_with(info("cheap", context=128, kv_tokens=128, watts=10.0), info("dear", watts=2000.0))
    assert where(submit(core, "t", 1.0, left=600.0, prompt_tokens=400)) == "dear"


def test_dear_placements_do_not_make_energy_cheap_for_the_next() -> None:
    """Of tasks that cost five times their least, that least counts."""
    core = core_with(info("cheap", kv_tokens=400, watts=50.0), info("dear", watts=250.0))
    scales = []
    for i in range(50):
        now, left = 1.0 + 10 * i, 6.0 if i < 20 else 1.4  # in the beginning, lengths are learned
        assert where(submit(core, f"a{i}", now, left=left, prompt_tokens=250)) == "cheap"
        if i >= 20:
            assert where(submit(core, f"b{i}", now, left=left, prompt_tokens=250)) == "dear"
            finish(core, f"b{i}", now + 1.0, 40, Counters(), Counters(), joules=250.0)
        finish(core, f"a{i}", now + 1.0, 40, Counters(), Counters(), joules=50.0)
        scales.append(core.snapshot()["state"]["scale"]["mean"])
    assert max(scales) < 80.0


def test_of_several_answers_each_one_s_length_is_learned() -> None:
    """Whether in one task or in four: what is believed of one more is the same."""
    one, four = core_with(info("a", slots=8)), core_with(info("a", slots=8))
    lengths = (12, 12, 40, 90)
    submit(four, "t", 1.0, left=60.0, n=4)
    four.handle(completed("t", "a", at=3.0, completion_tokens=sum(lengths), choice_tokens=lengths))
    for i, tokens in enumerate(lengths):
        submit(one, f"t{i}", 1.0, left=60.0)
        one.handle(completed(f"t{i}", "a", at=3.0, completion_tokens=tokens))
    learned = [core.snapshot()["state"]["lengths"] for core in (one, four)]
    assert learned[0] == learned[1] != []


def test_several_answers_need_the_cache_for_each() -> None:
    """The cache has room for one more usual answer, not for eight."""
    core = core_with(info("a", slots=12, kv_tokens=400, sequence=1e-6))
    for i in range(8):
        submit(core, f"t{i}", 1.0, left=60.0)
        core.handle(completed(f"t{i}", "a", at=1.5, completion_tokens=60))
    submit(core, "first", 2.0, left=60.0, max_tokens=60)
    (few,) = submit(core, "few", 2.0, left=60.0, n=2, max_tokens=60)
    assert few.action == "dispatch"
    assert submit(core, "many", 2.0, left=60.0, n=8, max_tokens=60) == []
    core.handle(Ended(at=2.1, id="many", state=State.CANCELLED))
    (one,) = submit(core, "one", 2.2, left=60.0, max_tokens=60)
    assert one.action == "dispatch"


def test_every_decision_is_explained() -> None:
    core = core_with(info("a", watts=50.0), info("b", watts=500.0))
    (decision,) = submit(core, "t", 1.0)
    scores = decision.explanation.candidates
    assert [c.node for c in scores] == ["a", "b"]
    for c in scores:
        assert c.finish is not None
        assert c.p_on_time is not None
        assert c.marginal_energy is not None
        assert c.confidence is not None
        assert 0 <= c.p_on_time <= 1
        assert set(c.slacks) == {"deadline", "compute", "memory", "bandwidth", "one_server"}
        assert c.index is not None
        assert c.note == ""
    assert scores[0].index is not None
    assert scores[1].index is not None
    assert scores[0].index > scores[1].index
    assert decision.explanation.sentence.startswith("a was the best of 2 candidate nodes: done in about")


def test_a_thousand_candidates_are_not_all_written_down() -> None:
    core = core_with(*(info(f"n{i}") for i in range(50)))
    (decision,) = submit(core, "t", 1.0)
    assert len(decision.explanation.candidates) == 8


def life(core: SchedulerCore, begin: int, end: int) -> list[str]:
    """A reproducible stretch of service: tasks of two classes come, run and end; returns the decisions, as JSON."""
    said = []
    for i in range(begin, end):
        now = 10.0 + 0.3 * i
        event = Submitted(
            id=f"t{i}",
            at=now,
            deadline=now + 2.0 + i % 5,
            service="chat" if i % 3 else "code",
            prompt_tokens=40 + 37 * (i % 7),
            payload_bytes=20_000 * (1 + i % 4),
            max_tokens=300,
            expected_tokens=None if i % 2 else 30 + i % 90,
        )
        core.handle(event)
        said += [json.dumps([d.task.id, d.action, d.explanation.model_dump()]) for d in settle(core, now)]
        for name in sorted(core.cluster.nodes):
            node = core.cluster.nodes[name]
            read = Counters(
                steps=20 * i,
                busy=0.5 * i * (1 + len(name) / 10),
                sequence_steps=50 * i,
                context_steps=9000 * i,
                prefilled=90 * i,
                longest_step=0.05,
                energy=60.0 * i,
            )
            progress = {t: 5 + f.generated for t, f in node.in_flight.items()}
            core.handle(Heartbeat(at=now + 0.1, node=name, boot=f"{name}.1", counters=read, progress=progress))
            for task_id in [t for t, f in node.in_flight.items() if f.generated > 20 + i % 11]:
                finish(core, task_id, now + 0.2, 20 + i % 60, read, read)
    return said


def test_a_restored_copy_decides_byte_for_byte_alike() -> None:
    nodes = (info("a"), info("bb", step=0.03, watts=40.0), info("ccc", step=0.015, watts=300.0))
    first = core_with(*nodes)
    life(first, 1, 60)
    state = json.loads(json.dumps(first.snapshot()))
    second = core_with(*nodes)
    second.restore(state)
    # The ledger knows nodes and tasks: give the copy those of the original.
    second.cluster, second._placed, second.pending = _copies(first)
    assert life(first, 60, 120) == life(second, 60, 120)
    assert json.dumps(first.snapshot()) == json.dumps(second.snapshot())


def test_forecasts_made_before_a_snapshot_are_not_used_after_it() -> None:
    """They rest on lengths believed then; the copy cannot know those, so the original must not go on with them."""
    first = core_with(info("a"), info("b"))
    for i in range(4):
        first.handle(Submitted(id=f"t{i}", at=1.0, deadline=5.0, prompt_tokens=50, max_tokens=200))
        first.handle(Dispatched(id=f"t{i}", at=1.0, node="ab"[i % 2], model="m", attempt=1))
        first.handle(Claimed(id=f"t{i}", at=1.0, node="ab"[i % 2], attempt=1))
    submit(first, "look", 1.1, left=4.0)  # every forecast is made
    finish(first, "t0", 1.2, 3, Counters(), Counters())  # lengths change, and of the nodes a alone
    state = json.loads(json.dumps(first.snapshot()))
    second = core_with(info("a"), info("b"))
    second.restore(state)
    second.cluster, second._placed, second.pending = _copies(first)
    said = [[d.explanation.model_dump_json() for d in submit(core, "next", 1.3, left=4.0)] for core in (first, second)]
    assert said[0]
    assert said[0] == said[1]


def _copies(core: SchedulerCore) -> tuple[Any, Any, Any]:
    from copy import deepcopy  # noqa: PLC0415

    return deepcopy((core.cluster, core._placed, core.pending))


def test_a_snapshot_of_another_shape_is_refused_and_nothing_changes() -> None:
    policy = CsUcb()
    before = json.dumps(policy.snapshot())
    for bad in ({}, {"scale": {"mean": 1.0}, "node_models": {}}):
        with pytest.raises((KeyError, ValueError)):
            policy.restore(bad)
        assert json.dumps(policy.snapshot()) == before


@pytest.mark.parametrize("name", Mechanisms.__dataclass_fields__)
def test_every_mechanism_can_be_switched_off(name: str) -> None:
    core = core_with(info("a"), info("bb", step=0.03), mechanisms=Mechanisms(**{name: False}))
    assert life(core, 1, 25)


# --- what generates nothing


EMBED = {"kind": "embed", "needs": ("embeddings",), "payload_bytes": 20_000, "service": "docs"}


def embedder(name: str, **fields: Any) -> NodeInfo:
    """A node that embeds: 5,000 tokens/s."""
    given = info(name, **fields)
    (offer,) = given.models
    can = {"capabilities": ("embeddings", "tokens"), "kv_tokens": 512, "context": 512}
    return given.model_copy(update={"models": (offer.model_copy(update=can),)})


def test_an_embedding_is_forecast_by_its_tokens_alone() -> None:
    core = core_with(embedder("n"), mechanisms=Mechanisms(learning=False))
    (decision,) = submit(core, "t", 1.0, left=60.0, prompt_tokens=20_000, **EMBED)
    (candidate,) = decision.explanation.candidates
    assert candidate.finish == pytest.approx(20_000 * 0.0002, rel=0.1)
    assert candidate.marginal_energy == pytest.approx(20_000 * 0.0002 * 100, rel=0.1)
    assert candidate.p_on_time == pytest.approx(1.0)
    assert decision.explanation.length is None
    (second,) = submit(core, "second", 1.1, left=60.0, prompt_tokens=20_000, **EMBED)
    (candidate,) = second.explanation.candidates
    assert candidate.finish == pytest.approx(2 * 20_000 * 0.0002, rel=0.15)


def test_embeddings_need_no_place_in_the_cache() -> None:
    """What is embedded is kept from no step to the next: many inputs do not fill a node."""
    core = core_with(embedder("n"))
    for number in range(3):
        (decision,) = submit(core, f"t{number}", 1.0, left=600.0, prompt_tokens=50_000, **EMBED)
        assert where([decision]) == "n"


def test_embeddings_teach_no_output_lengths() -> None:
    policy = CsUcb()
    core = SchedulerCore(policy)
    core.handle(NodeUp(at=0.0, info=embedder("n")))
    before = json.dumps(policy.snapshot()["lengths"])
    totals = Counters()
    for number in range(20):
        now = 1.0 + number
        submit(core, f"t{number}", now, left=60.0, prompt_tokens=1000, **EMBED)
        after = Counters(
            steps=totals.steps + 8, busy=totals.busy + 0.4, prefilled=totals.prefilled + 1000, sequence_steps=8
        )
        finish(core, f"t{number}", now + 0.5, 0, totals, after)
        totals = after
    assert json.dumps(policy.snapshot()["lengths"]) == before
    (known,) = policy.snapshot()["node_models"]["nodes"].values()
    (cost,) = known["step_costs"].values()
    assert cost["count"] > 5  # its prefill was learned
    assert cost["mean"][2] > 0.0002  # 0.4 s for 1,000 tokens: twice what it said at boot
