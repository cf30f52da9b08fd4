"""Answers that engines could give, and the pieces in which they could come."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import strategies as st

from perllm.broker.messages import Choice, Delta, Output, ToolCall

texts = st.text(max_size=24)
names = st.from_regex(r"[A-Za-z0-9_.:/-]{1,20}", fullmatch=True)
calls = st.builds(ToolCall, id=names, name=names, arguments=st.just('{"a": "ä"}') | texts)
logprobs = st.lists(
    st.fixed_dictionaries(
        {
            "token": texts,
            "logprob": st.floats(-100, 0),
            "bytes": st.just([1]),
            "top_logprobs": st.just([]),
        }
    ),
    max_size=3,
)


def _choices(kind: type[Choice]) -> st.SearchStrategy[Choice]:
    return st.builds(
        kind,
        text=texts,
        finish_reason=st.sampled_from(["stop", "length", "tool_calls"]),
        reasoning=st.none() | texts,
        tool_calls=st.lists(calls, max_size=3, unique_by=lambda call: call.id).map(tuple),
        logprobs=st.none() | logprobs,
        tokens=st.integers(0, 9),
    )


@st.composite
def outputs(draw: st.DrawFn, most: int = 3) -> Output:
    """What an engine produced: one answer or several."""
    output = draw(_choices(Output))
    assert isinstance(output, Output)
    return output.model_copy(update={"more": tuple(draw(st.lists(_choices(Choice), max_size=most - 1)))})


@st.composite
def pieces(draw: st.DrawFn, output: Output) -> list[Delta]:
    """The pieces of a beginning of its answers, those of several in any order."""
    queues = [draw(_of_choice(index, choice)) for index, choice in enumerate(output.choices)]
    said = []
    while queues := [queue for queue in queues if queue]:
        said.append(draw(st.sampled_from(queues)).pop(0))
    return said[: draw(st.integers(0, len(said)))]


@st.composite
def _of_choice(draw: st.DrawFn, index: int, choice: Choice) -> list[Delta]:
    said = [Delta(index=index, reasoning=piece) for piece in draw(_cut(choice.reasoning or ""))]
    texts = [Delta(index=index, text=piece) for piece in draw(_cut(choice.text))]
    before = draw(st.integers(0, len(texts)))  # a model may go on talking after a call
    said += texts[:before]
    for number, call in enumerate(choice.tool_calls):
        said.append(Delta(index=index, call=number, id=call.id, name=call.name))
        said += [Delta(index=index, call=number, arguments=piece) for piece in draw(_cut(call.arguments))]
    return said + texts[before:]


@st.composite
def _cut(draw: st.DrawFn, text: str) -> Sequence[str]:
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4))) if len(text) > 1 else []
    ends = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(ends) if a < b]
