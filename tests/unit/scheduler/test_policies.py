"""Every policy by name: what it is called, what it says of itself, what the mechanisms are."""

from __future__ import annotations

import pytest

from perllm.broker.errors import BadSetting
from perllm.scheduler.policies import (
    MECHANISMS_ADDED,
    core_options,
    describe_policies,
    describe_policy,
    policy_names,
)


def test_every_policy_is_described_in_a_sentence_the_default_first() -> None:
    described = describe_policies()
    assert {d.name for d in described} == set(policy_names())
    assert described[0].name == "cs-ucb"
    for name, sentence in described:
        assert 10 < len(sentence) < 200, name
        assert sentence.endswith("."), name
        assert "\n" not in sentence, name


def test_a_baseline_with_the_mechanisms_says_which() -> None:
    sentence = describe_policy("least-loaded+mech")
    assert sentence.startswith(describe_policy("least-loaded"))
    assert all(mechanism in sentence for mechanism in MECHANISMS_ADDED)


@pytest.mark.parametrize("name", ["jsq", "cs-ucb+mech", ""])
def test_a_policy_that_is_not_there_is_one_clear_error(name: str) -> None:
    with pytest.raises(BadSetting, match="choose one of"):
        describe_policy(name)


def test_what_the_mechanisms_are_to_the_core() -> None:
    assert core_options(2) == {"queue_beyond_slots": 2, "edf": True}
    assert core_options(2, mechanisms=False) == {"queue_beyond_slots": None, "edf": False}
