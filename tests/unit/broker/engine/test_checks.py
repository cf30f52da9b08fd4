"""What every engine checks of a request: that prompt and answer fit its context."""

from __future__ import annotations

import pytest

from perllm.broker.engine.checks import fitted
from perllm.broker.engine.contract import EngineError
from perllm.broker.messages import TaskSpec

SAID = TaskSpec(prompt="x", max_tokens=50)
NOT_SAID = TaskSpec(prompt="x", max_tokens=50, fit_context=True)


@pytest.mark.parametrize(
    ("spec", "prompt", "most"), [(SAID, 50, 50), (NOT_SAID, 50, 50), (NOT_SAID, 51, 49), (NOT_SAID, 99, 1)]
)
def test_an_answer_has_what_room_there_is(spec: TaskSpec, prompt: int, most: int) -> None:
    assert fitted(spec, prompt, context=100).max_tokens == most


@pytest.mark.parametrize(
    ("spec", "prompt", "reason"),
    [
        (SAID, 51, "prompt of 51 tokens and max_tokens 50 exceed the context of 100 tokens: lower max_tokens to 49"),
        (SAID, 100, "prompt of 100 tokens and max_tokens 50 exceed the context of 100 tokens: shorten the prompt"),
        (NOT_SAID, 100, "prompt of 100 tokens leaves no room in the context of 100 tokens: shorten it"),
        (SAID, 0, "prompt: has no tokens"),
        (NOT_SAID, 0, "prompt: has no tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(spec: TaskSpec, prompt: int, reason: str) -> None:
    with pytest.raises(EngineError) as caught:
        fitted(spec, prompt, context=100)
    assert (str(caught.value), caught.value.retry) == (reason, False)
