"""What is kept per service class: each tenant's apart, and bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perllm.scheduler.core.service_classes import MOST_CLASSES, TENANT_CLASSES, Classes


def test_the_class_asked_for_longest_ago_goes() -> None:
    classes: Classes[list[int]] = Classes(list)
    for n in range(TENANT_CLASSES):
        classes.get("a", str(n)).append(n)
    classes.get("a", "0")
    classes.get("a", "new")
    kept = [name for _, name, _ in classes]
    assert "0" in kept
    assert "1" not in kept
    assert classes.get("a", "1") == []  # known no more


def test_many_tenants_together_make_room_where_most_is() -> None:
    classes: Classes[list[int]] = Classes(list)
    classes.get("small", "only").append(1)
    for n in range(MOST_CLASSES):
        classes.get(f"t{n % 40}", f"c{n}")
    assert len(classes) == MOST_CLASSES
    assert classes.get("small", "only") == [1]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 150)), max_size=400))
def test_it_counts_what_it_has(asked: list[tuple[str, int]]) -> None:
    classes: Classes[list[int]] = Classes(list)
    for tenant, name in asked:
        classes.get(tenant, str(name)).append(name)
    kept = list(classes)
    assert len(kept) == len(classes)
    assert all(len([1 for t, _, _ in kept if t == tenant]) <= TENANT_CLASSES for tenant in "abc")
    if asked:
        assert (asked[-1][0], str(asked[-1][1])) in [(t, n) for t, n, _ in kept]
