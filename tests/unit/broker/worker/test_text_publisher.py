"""What is gathered of an answer before it is published."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perllm.broker.messages import Delta
from perllm.broker.worker.text_publisher import joined

INDICES = st.integers(0, 3)
PIECES = st.one_of(
    st.builds(Delta, index=INDICES, text=st.text("ab", min_size=1, max_size=3)),
    st.builds(Delta, index=INDICES, reasoning=st.text("ab", min_size=1, max_size=3)),
    st.builds(Delta, index=INDICES, call=st.integers(0, 1), arguments=st.text("ab", min_size=1, max_size=3)),
    st.builds(Delta, index=INDICES, call=st.integers(0, 1), id=st.just("c"), name=st.just("f")),
)


def told(deltas: list[Delta]) -> dict[int, list[tuple[object, ...]]]:
    """Character by character, what each answer was told, in order."""
    out: dict[int, list[tuple[object, ...]]] = {}
    for d in deltas:
        mine = out.setdefault(d.index, [])
        if d.name is not None:
            mine.append(("call", d.call, d.id, d.name))
        mine += [("text", c) for c in d.text] + [("reasoning", c) for c in d.reasoning]
        mine += [("arguments", d.call, c) for c in d.arguments]
    return out


@given(st.lists(PIECES, max_size=30))
def test_joining_changes_nothing_any_answer_says(deltas: list[Delta]) -> None:
    assert told(joined(deltas)) == told(deltas)


def test_answers_that_take_turns_are_one_piece_each() -> None:
    turns = [Delta(index=i, text=f"{step}") for step in range(9) for i in range(16)]
    assert joined(turns) == [Delta(index=i, text="012345678") for i in range(16)]
