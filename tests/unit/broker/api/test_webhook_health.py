"""When a webhook's circuit opens, and who gets the next turn: pure decisions."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.api.webhooks.health import DISABLE_AFTER, FIRST_PAUSE, MAX_FAILURES, MAX_PAUSE, SLOW_ATTEMPT, Health
from perllm.broker.api.webhooks.leases import share


def failed(health: Health, now: float, took: float = 0.1) -> Health:
    return health.after("HTTP 500", took, now)


def test_so_many_failures_in_a_row_open_the_circuit() -> None:
    health = Health()
    for n in range(MAX_FAILURES):
        assert health.state(n) == "closed"
        health = failed(health, n)
    assert health.state(MAX_FAILURES) == "open"
    assert health.reason == "HTTP 500"
    assert health.until == MAX_FAILURES - 1 + FIRST_PAUSE


def test_failures_that_take_long_open_it_sooner() -> None:
    assert failed(failed(Health(), 0, SLOW_ATTEMPT), 1, SLOW_ATTEMPT).state(2) == "open"


def test_a_success_between_begins_anew() -> None:
    health = Health()
    for n in range(100):
        health = failed(health, n) if n % MAX_FAILURES else health.after(None, 0.1, n)
        assert health.state(n) == "closed"
    assert health.after(None, 0.1, 100) == Health()


def test_probes_that_fail_come_at_growing_pauses_and_one_that_does_not_closes_it() -> None:
    health, now, pauses = Health(), 0.0, list[float]()
    for _ in range(MAX_FAILURES + 9):
        health = failed(health, now)
        if health.until:
            pauses.append(health.until - now)
            assert health.state(health.until - 0.1) == "open"
            assert health.state(health.until) == "half-open"
            now = health.until
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert pauses[-1] == MAX_PAUSE
    assert health.after(None, 0.1, now) == Health()


def test_what_was_on_its_way_when_it_opened_changes_nothing() -> None:
    health = Health()
    for _ in range(MAX_FAILURES):
        health = failed(health, 0)
    assert failed(health, 1) == health


def test_after_days_without_a_success_it_is_disabled() -> None:
    health, now = Health(), 0.0
    while not health.disabled:
        health = failed(health, now)
        now = max(now + 1, health.until)
    assert DISABLE_AFTER <= now <= DISABLE_AFTER + 2 * MAX_PAUSE
    assert health.reason == "nothing delivered for 3 days: HTTP 500"
    assert health.state(now + 1e9) == "disabled"


def test_a_single_failure_long_ago_disables_nothing() -> None:
    assert failed(failed(Health(), 0), 2 * DISABLE_AFTER).state(2 * DISABLE_AFTER) == "closed"


Hook = tuple[str, str]
hooks = st.lists(st.tuples(st.integers(0, 20).map(str), st.sampled_from("abcdefgh")), unique=True, max_size=60)


@given(hooks, st.data(), st.integers(0, 40))
def test_turns_are_shared_among_tenants(some: list[Hook], data: st.DataObject, most: int) -> None:
    busy = set(data.draw(st.lists(st.sampled_from(some), unique=True, max_size=most))) if some else set[Hook]()
    chosen = share(some, busy, most)
    assert len(set(chosen)) == len(chosen)
    assert not busy & set(chosen)
    assert len(busy) + len(chosen) <= max(most, len(busy))
    had, given_ = Counter(t for _, t in busy), Counter(t for _, t in chosen)
    free = most - len(busy) - len(chosen)
    for tenant in {t for _, t in some}:
        waits = [hook for hook, t in some if t == tenant and (hook, t) not in busy and (hook, t) not in chosen]
        assert waits == [] or free <= 0 or had[tenant] + given_[tenant] >= max(1, free // 4)
        if given_[tenant] > 1:  # nobody had to wait for him
            assert all(had[t] + given_[t] >= had[tenant] + given_[tenant] - 1 for t in _waiting(some, busy, chosen))


def _waiting(some: list[Hook], busy: set[Hook], chosen: list[Hook]) -> set[str]:
    return {t for hook, t in some if (hook, t) not in busy and (hook, t) not in chosen}


def test_one_tenant_leaves_most_turns_to_others_and_who_waited_longest_comes_first() -> None:
    mine = [(str(n), "one") for n in range(100)]
    assert share(mine, [], 32) == mine[:6]
    assert share([*mine, ("x", "two")], mine[:6], 32) == [("x", "two")]
    assert share([*mine, ("x", "two")], [], 1) == [("0", "one")]
