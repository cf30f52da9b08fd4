"""The checker finds what it is there to find: every kind of violation, planted one at a time into a good history."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chaos.checker import AMPLE, WINDOW, check
from chaos.history import Dump, History, Outage, Row, Saw, Seen, Told


def story(*steps: tuple[str, dict[str, object]]) -> list[Seen]:
    """Events a tenth of a second apart, from time 100 on."""
    made = []
    for number, (type_, fields) in enumerate(steps):
        made.append(Seen(position=f"{number}-0", at=100 + number / 10, type=type_, **fields))  # type: ignore[arg-type]
    return made


def good() -> History:
    """`a` succeeds, `b` is lost with its node once and succeeds, `c` strikes out, `d` expires and is forgotten."""

    def on(task: str, attempt: int, node: str = "n") -> dict[str, object]:
        return {"id": task, "attempt": attempt, "node": node}

    lapsed = {"cause": "lease_expired"}
    struck = "strike 3 of 3"
    events = story(
        ("node_up", {"node": "n"}),
        *(("submitted", {"id": i, "key": f"key-{i}"}) for i in "abcd"),
        ("dispatched", on("a", 1)),
        ("claimed", on("a", 1)),
        ("completed", on("a", 1) | {"state": "succeeded"}),
        ("dispatched", on("b", 1)),
        ("claimed", on("b", 1)),
        ("returned", on("b", 1) | lapsed | {"strikes": 1}),
        ("dispatched", on("b", 2, "m")),
        ("returned", on("b", 2, "m") | {"cause": "handed_back", "strikes": 1}),
        ("dispatched", on("b", 3, "m")),
        ("claimed", on("b", 3, "m")),
        ("completed", on("b", 3, "m") | {"state": "succeeded"}),
        *(
            step
            for n in (1, 2)
            for step in (
                ("dispatched", on("c", n)),
                ("claimed", on("c", n)),
                ("returned", on("c", n) | {"cause": "failed", "strikes": n}),
            )
        ),
        ("dispatched", on("c", 3)),
        ("claimed", on("c", 3)),
        ("ended", {"id": "c", "state": "failed", "reason": struck}),
        ("ended", {"id": "d", "state": "expired"}),
    )
    tasks = {
        "a": Row("succeeded", 1, 0, "result a", "succeeded", 1),
        "b": Row("succeeded", 3, 1, "result b", "succeeded", 3),
        "c": Row("failed", 3, 3, "result c", "failed"),
    }
    dump = Dump(
        tasks=tasks,
        sets={"succeeded": {"a", "b"}, "failed": {"c"}},
        tenants={"default": {"a", "b", "c"}},
        totals={"submitted": 4, "succeeded": 2, "failed": 1, "expired": 1, "forgotten": 1},
        held={"default": 3 * 1024},
        celery_results={"a", "b", "c"},
        other_keys={"{perllm}:events", "{perllm}:totals", "{perllm}:key:default key-a", "_kombu.binding.celeryev"},
    )
    told = [Told(i, f"key-{i}", 100 + n / 10, 100 + n / 10) for n, i in enumerate("abcd")]
    tried = {f"key-{i}" for i in "abcdef"}
    return History(tried, told, [Saw("a", "result a", 101, 101)], events, set(), [], dump, 3, 2)


def add(history: History, type_: str, **fields: object) -> None:
    number = len(history.events)
    history.events.append(Seen(f"{number}-0", 100 + number / 10, type_, **fields))  # type: ignore[arg-type]


def test_a_good_history_is_good() -> None:
    report = check(good())
    assert report.violations == []
    assert (report.tasks, report.attempts_max, report.forgiven) == (4, 3, 0)
    assert report.ended == {"succeeded": 2, "failed": 1, "expired": 1}


# --- planted violations: what is done to the good history, and what must be found


def lose(h: History) -> None:
    h.told.append(Told("e", "key-e", 100.9, 101.0))


def lose_after_it_ran(h: History) -> None:
    add(h, "submitted", id="e", key="key-e")
    add(h, "dispatched", id="e", node="n", attempt=1)
    h.dump.totals["submitted"] += 1


def lose_in_the_last_second_under_always(h: History) -> None:
    lose(h)
    h.outages.append(Outage(101.5, "always"))


def lose_long_before_the_outage(h: History) -> None:
    lose(h)
    h.outages.append(Outage(101.0 + WINDOW + 0.1, "everysec"))


def complete_twice(h: History) -> None:
    add(h, "completed", id="a", node="n", attempt=1, state="succeeded")
    h.dump.totals["succeeded"] += 1


def count_bytes_of_what_is_gone(h: History) -> None:
    h.dump.held["default"] += 1


def submit_twice(h: History) -> None:
    add(h, "submitted", id="e", key="key-a")
    add(h, "ended", id="e", state="cancelled")
    h.dump.totals |= {"submitted": 5, "cancelled": 1, "forgotten": 2}


def overwrite_seen_result(h: History) -> None:
    h.dump.tasks["a"] = h.dump.tasks["a"]._replace(result="another")


def overwrite_by_late_attempt(h: History) -> None:
    h.dump.tasks["b"] = h.dump.tasks["b"]._replace(result_attempt=1)


def overwrite_state(h: History) -> None:
    h.dump.tasks["c"] = Row("succeeded", 3, 3, "result c", "succeeded", 3)
    h.dump.sets = {"succeeded": {"a", "b", "c"}}


def final_without_result(h: History) -> None:
    h.dump.tasks["a"] = h.dump.tasks["a"]._replace(result=None, result_state=None)
    h.saw.clear()


def stick(h: History, state: str) -> None:
    add(h, "submitted", id="e", key="key-e")
    h.dump.tasks["e"] = Row(state, 0, 0, None)
    h.dump.sets[state] = {"e"}
    h.dump.tenants["default"].add("e")
    h.dump.totals["submitted"] += 1


def stick_pending(h: History) -> None:
    stick(h, "pending")


def stick_running(h: History) -> None:
    stick(h, "running")


def expire_though_there_was_time(h: History) -> None:
    index = next(i for i, e in enumerate(h.events) if e.key == "key-d")
    h.events[index] = h.events[index]._replace(window=AMPLE)


def skip_an_attempt(h: History) -> None:
    h.events[8] = h.events[8]._replace(attempt=2)
    h.events[9] = h.events[9]._replace(attempt=2)
    h.events[10] = h.events[10]._replace(attempt=2)


def dispatch_twice(h: History) -> None:
    h.events.insert(9, h.events[8]._replace(position="8-1", node="m", attempt=2))


def claim_elsewhere(h: History) -> None:
    h.events[6] = h.events[6]._replace(node="m")


def go_on_after_the_end(h: History) -> None:
    add(h, "dispatched", id="d", node="n", attempt=1)


def strike_unjustly(h: History) -> None:
    index = next(i for i, e in enumerate(h.events) if e.cause == "handed_back")
    h.events[index] = h.events[index]._replace(strikes=2)


def forgive_a_strike(h: History) -> None:
    index = next(i for i, e in enumerate(h.events) if e.cause == "lease_expired")
    h.events[index] = h.events[index]._replace(strikes=0)


def fail_too_soon(h: History) -> None:
    index = next(i for i, e in enumerate(h.events) if e.state == "failed")
    del h.events[index - 5 : index - 2]  # one attempt less
    h.events[index - 5] = h.events[index - 5]._replace(attempt=2)
    h.events[index - 4] = h.events[index - 4]._replace(attempt=2)
    h.dump.tasks["c"] = h.dump.tasks["c"]._replace(attempt=2)


def appear_from_nowhere(h: History) -> None:
    add(h, "submitted", id="e", key="key-x")
    add(h, "ended", id="e", state="cancelled")
    h.dump.totals |= {"submitted": 5, "cancelled": 1, "forgotten": 2}


def undo(h: History) -> None:
    add(h, "claimed", id="a", node="n", attempt=1)
    h.undone.add(h.events[-1].position)


def drift_total(h: History) -> None:
    h.dump.totals["succeeded"] += 1
    h.dump.totals["forgotten"] += 1


def drift_forgotten(h: History) -> None:
    h.dump.totals["forgotten"] -= 1


def drift_set(h: History) -> None:
    h.dump.sets["succeeded"].discard("a")


def two_sets(h: History) -> None:
    h.dump.sets["running"] = {"a"}


def drift_tenant(h: History) -> None:
    h.dump.tenants["default"].add("d")


def drift_attempts(h: History) -> None:
    h.dump.tasks["a"] = h.dump.tasks["a"]._replace(attempt=2)


def leak_queue(h: History) -> None:
    h.dump.other_keys.add("edge.n")


def leak_node(h: History) -> None:
    h.dump.other_keys.add("{perllm}:node:n:tasks")


def leak_celery_result(h: History) -> None:
    h.dump.celery_results.add("d")


def miss_celery_result(h: History) -> None:
    h.dump.celery_results.discard("a")


PLANTED: list[tuple[Callable[[History], None], str, str]] = [
    (lose, "lost", "e"),
    (lose_after_it_ran, "lost", "e"),
    (lose_in_the_last_second_under_always, "lost", "e"),
    (lose_long_before_the_outage, "lost", "e"),
    (complete_twice, "doubled", "a"),
    (submit_twice, "doubled", "key-a"),
    (count_bytes_of_what_is_gone, "drift", "default"),
    (overwrite_seen_result, "overwritten", "a"),
    (overwrite_by_late_attempt, "overwritten", "b"),
    (overwrite_state, "overwritten", "c"),
    (final_without_result, "overwritten", "a"),
    (stick_pending, "stuck", "e"),
    (stick_running, "stuck", "e"),
    (expire_though_there_was_time, "stuck", "d"),
    (skip_an_attempt, "path", "b"),
    (dispatch_twice, "path", "b"),
    (claim_elsewhere, "path", "a"),
    (go_on_after_the_end, "path", "d"),
    (strike_unjustly, "strikes", "b"),
    (forgive_a_strike, "strikes", "b"),
    (fail_too_soon, "strikes", "c"),
    (appear_from_nowhere, "phantom", "key-x"),
    (undo, "undone", "a"),
    (drift_total, "drift", "succeeded"),
    (drift_forgotten, "drift", "forgotten"),
    (drift_set, "drift", "a"),
    (two_sets, "drift", "a"),
    (drift_tenant, "drift", "d"),
    (drift_attempts, "drift", "a"),
    (leak_queue, "leaked", "edge.n"),
    (leak_node, "leaked", "{perllm}:node:n:tasks"),
    (leak_celery_result, "leaked", "d"),
    (miss_celery_result, "leaked", "a"),
]


@pytest.mark.parametrize(("plant", "kind", "subject"), PLANTED, ids=[p.__name__ for p, _, _ in PLANTED])
def test_a_planted_violation_is_found(plant: Callable[[History], None], kind: str, subject: str) -> None:
    history = good()
    plant(history)
    report = check(history)
    assert (kind, subject) in {(v.kind, v.subject) for v in report.violations}
    assert report.count(kind) == 1


def test_what_everysec_may_forget_is_forgiven_and_counted() -> None:
    history = good()
    lose(history)
    undo(history)
    history.outages.append(Outage(history.events[-1].at + 0.1, "everysec"))
    end = history.events[-1].at
    history.saw.append(Saw("a", "a result that was undone", end - 0.1, end))
    history.told[-1] = history.told[-1]._replace(at=end - 0.4)
    report = check(history)
    assert report.violations == []
    assert report.forgiven == 1
    assert report.oldest == pytest.approx(0.5)


def test_who_was_frozen_before_it_could_note_what_it_knew_is_forgiven_too() -> None:
    history = good()
    history.told.append(Told("e", "key-e", 100.9, 105.0))
    history.outages.append(Outage(101.0, "everysec"))
    assert check(history).violations == []
    history.told.append(Told("f", "key-f", 101.1, 105.0))  # asked after the server had come back
    assert check(history).count("lost") == 1


def test_a_key_lives_as_long_as_its_task() -> None:
    """Of each final state two tasks are kept here: the third that succeeds has the first forgotten, and its key."""
    history = good()
    submit_twice(history)
    again = history.events[-2:]
    assert check(history).count("doubled") == 1
    del history.events[-2:]
    add(history, "submitted", id="f", key="key-f")
    add(history, "completed", id="f", state="succeeded")
    history.events += again
    assert [v.kind for v in check(history).violations if v.subject == "key-a"] == []


def test_an_event_undone_does_not_count() -> None:
    """The server forgot the completion and the task ran again: one result, not two."""
    history = good()
    first = history.events[7]
    assert (first.type, first.id) == ("completed", "a")
    history.undone.add(first.position)
    history.outages.append(Outage(first.at + 0.5, "everysec"))
    history.events.append(first._replace(position="99-0", at=first.at + 1))
    assert check(history).violations == []
