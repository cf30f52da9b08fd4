"""The ledger on each real server: what the state machine beside this does not reach, and what it reaches rarely."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.make import node_info, output, receipt, why
from support.ports import free_port
from support.raw import prefix_of, redis_of
from support.wait import eventually

from perllm.broker import functions
from perllm.broker.errors import Unreachable
from perllm.broker.ledger import Dispatch, Ledger, weight
from perllm.broker.ledger.scheduler import DISPATCH_LEASE, SWEEP_LIMIT
from perllm.broker.local.server import EmbeddedServer
from perllm.broker.messages import Counters, Heartbeat, State, Submitted, TaskSpec, new_id
from perllm.broker.queues.app import node_message
from perllm.broker.settings import Settings


def submit(ledger: Ledger, **fields: object) -> str:
    return ledger.submit([(new_id(), TaskSpec.model_validate({"prompt": "hi"} | fields))])[0]


def run(ledger: Ledger, task_id: str, attempt: int = 1, token: str = "token") -> None:
    """Bring a pending task to running on node n."""
    epoch = ledger.lead("test", 60)
    assert epoch is not None
    if not ledger.nodes():
        assert ledger.register(node_info("n")) is None
    message = node_message(task_id, attempt, "edge.n")
    sent = Dispatch(task_id, attempt, "n", "boot-1", "emulated", "edge.n", message, why())
    assert ledger.dispatch(epoch, [sent]) == ["ok"]
    assert ledger.claim(task_id, attempt, "n", token) is not None


def lapse(ledger: Ledger, task_id: str, state: str) -> None:
    """Move the end of a lease into the past."""
    redis_of(ledger).zadd(f"{prefix_of(ledger)}in:{state}", {task_id: ledger.now() - 1})


# --- text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1), answer=st.text(), reason=st.text())
def test_any_text_comes_back_as_it_was(ledger: Ledger, text: str, answer: str, reason: str) -> None:
    good, bad = submit(ledger, prompt=text, metadata={"k": text[:100]}), submit(ledger, prompt=text)
    for task_id in (good, bad):
        run(ledger, task_id)
    assert ledger.complete(good, 1, "token", "succeeded", output(answer), receipt("n")) == "ok"
    assert ledger.fail(bad, 1, "token", reason, retry=False) == "ok"
    done, failed = ledger.results([good, bad])
    assert done is not None
    assert failed is not None
    assert (done.text, failed.reason) == (answer, reason)
    record = ledger.task(good)
    assert record is not None
    assert (record.spec.prompt, record.spec.metadata) == (text, {"k": text[:100]})
    assert json.loads(redis_of(ledger).get(f"celery-task-meta-{bad}") or b"")["result"]["exc_message"] == [reason]
    assert [e.reason for _, e in ledger.events("0-0") if e.type == "ended"][-1] == reason


# --- submitting


def test_a_long_iterator_goes_in_pieces_and_in_order(ledger: Ledger) -> None:
    def tasks() -> Iterator[tuple[str, TaskSpec]]:
        for n in range(3000):
            yield f"t{n}", TaskSpec(prompt="x" * (300_000 if n % 500 == 0 else 10))

    assert ledger.submit(tasks()) == [f"t{n}" for n in range(3000)]
    assert ledger.counts()[State.PENDING] == ledger.totals()["submitted"] == 3000
    assert [e.id for _, e in ledger.events("0-0", count=5000) if isinstance(e, Submitted)] == [
        f"t{n}" for n in range(3000)
    ]


def test_nothing_to_submit(ledger: Ledger) -> None:
    assert ledger.submit([]) == []


def test_tenants_do_not_share_keys(ledger: Ledger) -> None:
    ids = [
        submit(ledger, tenant="a", idempotency_key="b:c"),
        submit(ledger, tenant="a:b", idempotency_key="c"),
        submit(ledger, tenant="a", idempotency_key="b"),
    ]
    assert len(set(ids)) == 3
    assert submit(ledger, tenant="a", idempotency_key="b:c") == ids[0]


def test_one_key_twice_in_one_call(ledger: Ledger) -> None:
    spec = TaskSpec(prompt="hi", idempotency_key="k")
    assert ledger.submit([("first", spec), ("second", spec)]) == ["first", "first"]


def test_the_functions_may_be_flushed_at_any_time(ledger: Ledger) -> None:
    submit(ledger)
    redis_of(ledger).execute_command("FUNCTION", "FLUSH")
    assert ledger.submit((f"t{n}", TaskSpec(prompt="hi")) for n in range(500)) == [f"t{n}" for n in range(500)]
    functions.load_all(redis_of(ledger))  # for the roles of other tests, who may not


def test_a_full_server_stores_nothing_and_says_so(ledger: Ledger) -> None:
    redis_of(ledger).config_set("maxmemory-policy", "noeviction")
    redis_of(ledger).config_set("maxmemory", 1)
    try:
        with pytest.raises(Unreachable, match="out of memory and stored nothing"):
            submit(ledger, prompt="x" * 100_000)
        assert ledger.counts()[State.PENDING] == 0
        assert ledger.totals() == {}
    finally:
        redis_of(ledger).config_set("maxmemory", 0)
    submit(ledger)


def test_what_was_accepted_still_ends_on_a_full_server(ledger: Ledger) -> None:
    runs, breaks, waits, unwanted = (submit(ledger) for _ in range(4))
    run(ledger, runs)
    run(ledger, breaks)
    redis_of(ledger).config_set("maxmemory-policy", "noeviction")
    redis_of(ledger).config_set("maxmemory", 1)
    try:
        with pytest.raises(Unreachable, match="out of memory and stored nothing"):
            ledger.submit((f"t{n}", TaskSpec(prompt="x" * 1000)) for n in range(1000))
        assert ledger.complete(runs, 1, "token", "succeeded", output("x" * 10_000), receipt("n")) == "ok"
        assert ledger.fail(breaks, 1, "token", "broke", retry=True) == "ok"
        assert ledger.cancel(unwanted) is State.PENDING
        run(ledger, waits)  # dispatched and claimed
        assert ledger.complete(waits, 1, "token", "succeeded", output(), receipt("n")) == "ok"
        assert ledger.save_snapshot(ledger.lead("test", 60) or 0, {"learned": "x" * 10_000})
    finally:
        redis_of(ledger).config_set("maxmemory", 0)
    assert ledger.totals() == {"submitted": 4, "succeeded": 2, "cancelled": 1}


def test_a_disk_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """A server that could not save answers every write with MISCONF, whatever kept it from saving."""
    with EmbeddedServer(tmp_path / "data", free_port()) as server:
        ledger = Ledger(Settings.model_validate({"redis_url": server.url}))
        task_id = submit(ledger)
        run(ledger, task_id)
        shutil.rmtree(tmp_path / "data")
        redis_of(ledger).config_set("save", "1 1")
        redis_of(ledger).bgsave()
        eventually(lambda: redis_of(ledger).info("persistence")["rdb_last_bgsave_status"] == "err", "it cannot save")
        with pytest.raises(Unreachable, match="cannot write to its disk and stored nothing: make room there"):
            submit(ledger)
        with pytest.raises(Unreachable, match="MISCONF"):  # so a worker keeps its result and tries again
            ledger.complete(task_id, 1, "token", "succeeded", output(), receipt("n"))
        redis_of(ledger).config_set("stop-writes-on-bgsave-error", "no")
        assert ledger.complete(task_id, 1, "token", "succeeded", output(), receipt("n")) == "ok"
        assert ledger.totals() == {"submitted": 1, "succeeded": 1}
        redis_of(ledger).config_set("save", "")
        ledger.close()


# --- attempts


def test_a_result_for_a_cancelled_task_is_void(ledger: Ledger) -> None:
    task_id = submit(ledger)
    run(ledger, task_id)
    ledger.cancel(task_id)
    assert ledger.complete(task_id, 1, "token", "succeeded", output(), receipt("n")) == "void"


def test_a_repeated_completion_is_ok_and_changes_nothing(ledger: Ledger) -> None:
    task_id = submit(ledger)
    run(ledger, task_id)
    assert ledger.complete(task_id, 1, "token", "succeeded", output("first"), receipt("n")) == "ok"
    assert ledger.complete(task_id, 1, "token", "succeeded", output("second"), receipt("n")) == "ok"
    result = ledger.results([task_id])[0]
    assert result is not None
    assert result.text == "first"
    assert ledger.totals()["succeeded"] == 1


def test_the_same_token_under_another_attempt_is_void(ledger: Ledger) -> None:
    task_id = submit(ledger)
    run(ledger, task_id)
    ledger.hand_back(task_id, 1, "token", "stopping")
    run(ledger, task_id, attempt=2)
    assert ledger.complete(task_id, 1, "token", "succeeded", output(), receipt("n")) == "void"
    assert ledger.complete(task_id, 2, "token", "succeeded", output(), receipt("n", attempt=2)) == "ok"


def test_work_that_hangs_beyond_its_deadline_is_renewed_no_more(ledger: Ledger) -> None:
    task_id = submit(ledger)
    run(ledger, task_id)
    heartbeat = Heartbeat(at=0, node="n", boot="boot-1", counters=Counters())
    lapse(ledger, task_id, "running")
    assert ledger.beat(heartbeat, [(task_id, 1, "token")]) == []
    assert ledger.sweep() == 0
    long_ago = ledger.now() - 301  # by more than a lease
    redis_of(ledger).hset(f"{prefix_of(ledger)}task:{task_id}", "deadline", long_ago)  # moves time
    assert ledger.beat(heartbeat, [(task_id, 1, "token")]) == []
    assert ledger.sweep() == 1
    assert state_of(ledger, task_id) == "expired"
    assert ledger.beat(heartbeat, [(task_id, 1, "token")]) == [task_id]  # it is told to stop


def dispatch(ledger: Ledger, task_id: str, attempt: int = 1) -> str:
    """Send a pending task to node n."""
    message = node_message(task_id, attempt, "edge.n")
    sent = Dispatch(task_id, attempt, "n", "boot-1", "emulated", "edge.n", message, why())
    return ledger.dispatch(ledger.lead("test", 60) or 0, [sent])[0]


def state_of(ledger: Ledger, task_id: str) -> str:
    record = ledger.task(task_id)
    assert record is not None
    return str(record.state)


def test_waiting_too_long_in_a_nodes_queue_is_no_strike(ledger: Ledger) -> None:
    ledger.register(node_info("n"))
    waits = submit(ledger, deadline=3600)
    assert dispatch(ledger, waits) == "ok"
    until = redis_of(ledger).zscore(f"{prefix_of(ledger)}in:dispatched", waits)
    assert until == pytest.approx(ledger.now() + DISPATCH_LEASE, abs=2)
    lapse(ledger, waits, "dispatched")
    assert ledger.sweep() == 1
    record = ledger.task(waits)
    assert record is not None
    assert (record.state, record.strikes, record.node) == ("pending", 0, None)
    assert ledger.claim(waits, 1, "n", "token") is None


def test_what_a_node_does_not_take_up_is_taken_back_unless_it_is_claimed_after_all(ledger: Ledger) -> None:
    ledger.register(node_info("n"))
    epoch = ledger.lead("test", 60) or 0
    waits, claimed, late = (submit(ledger, deadline=3600) for _ in range(3))
    for task_id in (waits, claimed, late):
        assert dispatch(ledger, task_id) == "ok"
    assert ledger.claim(claimed, 1, "n", "token") is not None
    ledger.cancel(late)
    taken = [(task_id, 1) for task_id in (waits, claimed, late)] + [(waits, 2), ("nobody", 1)]
    assert ledger.take_back(epoch, taken, "no reason") == ["ok", "refused", "refused", "refused", "refused"]
    assert ledger.take_back(epoch - 1, [(claimed, 1)], "no reason") == ["not_leader"]
    record = ledger.task(waits)
    assert record is not None
    assert (record.state, record.strikes, record.node) == ("pending", 0, None)
    assert ledger.claim(waits, 1, "n", "token") is None
    assert state_of(ledger, claimed) == "running"


def test_a_node_is_distrusted_until_it_is_told_otherwise_or_starts_anew(ledger: Ledger) -> None:
    for name in ("n", "m"):
        ledger.register(node_info(name))
    epoch = ledger.lead("test", 60) or 0
    ledger.distrust(epoch, "n", "boot-1", "it sleeps")
    ledger.distrust(epoch, "m", "boot-0", "of a former life")
    ledger.distrust(epoch - 1, "m", "boot-1", "by a former leader")
    ledger.distrust(epoch, "nobody", "boot-1", "it is not there")
    assert ledger.distrusted(["n", "m", "nobody"]) == {"n": "it sleeps"}
    ledger.distrust(epoch, "n", "boot-1", "")
    assert ledger.distrusted(["n", "m"]) == {}
    ledger.distrust(epoch, "n", "boot-1", "it sleeps")
    ledger.register(node_info("n"))
    assert ledger.distrusted(["n"]) == {}


def test_what_is_dispatched_ends_with_its_deadline(ledger: Ledger) -> None:
    ledger.register(node_info("n"))
    task_id = submit(ledger, deadline=5)
    assert dispatch(ledger, task_id) == "ok"
    until = redis_of(ledger).zscore(f"{prefix_of(ledger)}in:dispatched", task_id)
    assert until == pytest.approx(ledger.now() + 5, abs=2)
    redis_of(ledger).hset(f"{prefix_of(ledger)}task:{task_id}", "deadline", ledger.now() - 1)  # moves time
    lapse(ledger, task_id, "dispatched")
    assert ledger.sweep() == 1
    assert state_of(ledger, task_id) == "expired"


def test_a_sweep_is_bounded_and_ends(ledger: Ledger) -> None:
    count = SWEEP_LIMIT + 10
    ids = ledger.submit((f"t{n}", TaskSpec(prompt="hi")) for n in range(count))
    redis_of(ledger).zadd(f"{prefix_of(ledger)}in:pending", dict.fromkeys(ids, 1.0))  # moves time
    assert [ledger.sweep(), ledger.sweep(), ledger.sweep()] == [SWEEP_LIMIT, 10, 0]
    assert ledger.counts()[State.EXPIRED] == count


def test_room_for_embeddings_is_kept_from_the_submission_on(ledger: Ledger) -> None:
    """Or a tenant could hand in more than there is room for: a few bytes of text may come to megabytes."""

    def held() -> int:
        return ledger.stored_bytes(["default"])[0]

    spec = TaskSpec(kind="embed", inputs=("a",) * 100, dimensions=300)
    assert spec.embeddings_bytes() == 160_000
    ids = [new_id() for _ in range(3)]
    ledger.submit((task_id, spec) for task_id in ids)
    each = weight(spec)
    assert each > 2 * 160_000
    assert held() == 3 * each
    run(ledger, ids[0])
    done = output().model_copy(update={"vectors": ("A" * 1600,) * 100})
    assert ledger.complete(ids[0], 1, "token", "succeeded", done, receipt("n")) == "ok"
    assert 3 * each < held() < 3.02 * each
    ledger.cancel(ids[1])
    assert 2 * each < held() < 2.02 * each
    ledger.forget(ids[0])
    assert each < held() < each + 2000
    for task_id in ids[1:]:
        ledger.forget(task_id)
    assert held() == 0
    written = {"kind": "embed", "inputs": ['"result_bytes": 9000000'], "service": "x"}
    crafted = ledger.submit([(new_id(), TaskSpec.model_validate(written))])
    assert held() < 15_000
    ledger.forget(crafted[0])
    assert held() == 0


def test_an_end_is_told_to_who_waits_without_its_result(ledger: Ledger) -> None:
    """Results may be megabytes, and the server cuts a subscriber that is sent too much."""
    done, gone = submit(ledger), submit(ledger)
    subscription = redis_of(ledger).pubsub(ignore_subscribe_messages=True)
    subscription.subscribe(ledger.ended(done), ledger.ended(gone))
    run(ledger, done)
    assert ledger.complete(done, 1, "token", "succeeded", output("x" * 100_000), receipt("n")) == "ok"
    ledger.cancel(gone)
    ledger.announce()
    heard: list[tuple[bytes, bytes]] = []

    def both() -> bool:
        if (message := subscription.get_message(timeout=0.1)) is not None:
            heard.append((message["channel"], message["data"]))
        return len(heard) == 2

    eventually(both, "both ends are told")
    assert heard == [(ledger.ended(done).encode(), b"succeeded"), (ledger.ended(gone).encode(), b"cancelled")]
    subscription.close()


def test_a_key_lives_as_long_as_its_task(ledger: Ledger, settings: Settings) -> None:
    """Not longer, when the task is forgotten by count; not shorter, when it waits beyond the retention time."""
    few = Ledger(settings.model_copy(update={"retention_tasks": 1}))
    first, second = submit(few, idempotency_key="a"), submit(few, idempotency_key="b")
    assert redis_of(few).ttl(f"{prefix_of(few)}key:default a") == -1
    few.cancel(first)
    few.cancel(second)
    assert few.sweep() == 1
    assert [few.task(first), submit(few, idempotency_key="b")] == [None, second]
    assert submit(few, idempotency_key="a") != first
    few.close()


def test_a_set_naming_what_is_no_task_does_not_stop_the_sweep(ledger: Ledger) -> None:
    task_id = submit(ledger)
    for state in ("pending", "dispatched", "running"):
        redis_of(ledger).zadd(f"{prefix_of(ledger)}in:{state}", {"nobody": 1.0})
    redis_of(ledger).zadd(f"{prefix_of(ledger)}in:running", {task_id: 1.0})
    redis_of(ledger).zadd(f"{prefix_of(ledger)}in:pending", {task_id: 1.0})
    assert ledger.sweep() == 5
    assert ledger.counts() == {s: int(s is State.EXPIRED) for s in State}


# --- reading


def test_what_the_scheduler_takes_over(ledger: Ledger) -> None:
    waits, returned, runs = (submit(ledger, value=2, service="chat", expected_tokens=7) for _ in range(3))
    run(ledger, returned)
    ledger.fail(returned, 1, "token", "broke", retry=True)
    run(ledger, runs)
    placements = dict(zip((waits, returned, runs), ledger.features([waits, returned, runs]), strict=True))
    for placement in placements.values():
        assert placement is not None
        told = placement.submitted
        assert (told.value, told.service, told.expected_tokens) == (2, "chat", 7)
        assert told.deadline == pytest.approx(told.at + 60)
    at = {i: (p.submitted.attempt, p.submitted.strikes, p.dispatched, p.claimed) for i, p in placements.items() if p}
    assert at[waits] == (0, 0, None, None)
    assert at[returned] == (1, 1, None, None)
    dispatched, claimed = at[runs][2:]
    assert dispatched is not None
    assert claimed is not None
    assert (dispatched.node, dispatched.attempt, claimed.attempt) == ("n", 1, 1)
    assert ledger.features(["nobody"]) == [None]
    assert {i for _, i in ledger.unfinished()} == {waits, returned, runs}


def test_unreadable_events_are_passed_over_however_many(ledger: Ledger) -> None:
    stream = f"{prefix_of(ledger)}events"
    for entry in ({"e": "not JSON"}, {"e": '{"type":"of the future"}'}, {"x": "no event"}, {"e": b"\xff"}):
        for _ in range(4):
            redis_of(ledger).xadd(stream, entry)
    task_id = submit(ledger)
    seen = ledger.events("0-0", count=3)
    assert [e.id for _, e in seen if isinstance(e, Submitted)] == [task_id]
    assert ledger.events(seen[-1][0], count=3, block=0.01) == []


def test_the_stream_is_trimmed(ledger: Ledger, settings: Settings) -> None:
    short = Ledger(settings.model_copy(update={"stream_length": 1000}))
    short.submit((f"t{n}", TaskSpec(prompt="hi")) for n in range(5000))
    assert 1000 <= redis_of(ledger).xlen(f"{prefix_of(ledger)}requests") < 1500
    short.close()


def test_a_node_that_is_nonsense_hides_no_other(ledger: Ledger) -> None:
    assert ledger.register(node_info("n")) is None
    for name, info in (("x", "not JSON"), ("y", '{"name": "y", "slots": -3}')):
        redis_of(ledger).hset(f"{prefix_of(ledger)}node:{name}", mapping={"info": info, "boot": "b"})
        redis_of(ledger).zadd(f"{prefix_of(ledger)}nodes", {name: ledger.now() + 60})
    redis_of(ledger).zadd(f"{prefix_of(ledger)}nodes", {"z": ledger.now() + 60})
    assert [info.name for info, _, _ in ledger.nodes()] == ["n"]


def test_results_of_many(ledger: Ledger) -> None:
    done, waits = submit(ledger), submit(ledger)
    ledger.cancel(done)
    results = ledger.results([waits, done, "nobody"])
    assert [r and r.state for r in results] == [None, State.CANCELLED, None]
    assert ledger.known([waits, done, "nobody"]) == [True, True, False]
    assert ledger.ids(State.PENDING) == [waits]
    assert ledger.ids(State.CANCELLED, newest=True, limit=1) == [done]
    assert ledger.task("nobody") is None


def test_cells_on_one_server_do_not_meet(ledger: Ledger, settings: Settings) -> None:
    other = Ledger(settings.model_copy(update={"cell": "other"}))
    submit(ledger)
    assert other.counts()[State.PENDING] == 0
    assert other.lead("x", 60) == ledger.lead("y", 60) == 1
    other.close()


# --- leadership


def test_a_leader_that_resigns_is_followed_at_once(ledger: Ledger) -> None:
    assert ledger.lead("a", 60) == 1
    assert ledger.lead("b", 60) is None
    ledger.resign("b")  # not its to give up
    assert ledger.lead("b", 60) is None
    ledger.resign("a")
    assert ledger.lead("b", 60) == 2
    assert not ledger.save_snapshot(1, {"old": True})
    assert ledger.save_snapshot(2, {"new": True})
    assert ledger.load_snapshot() == {"new": True}


def test_leadership_lapses(ledger: Ledger) -> None:
    assert ledger.lead("a", 0.001) == 1
    while (epoch := ledger.lead("b", 60)) is None:
        pass
    assert epoch == 2
