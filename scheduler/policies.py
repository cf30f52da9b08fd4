"""Every policy by name, and what `+mech` adds: one place for the live service, the simulator, the CLI and the docs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

from perllm.broker.errors import BadSetting
from perllm.scheduler.baselines.cheapest_feasible import CheapestFeasible
from perllm.scheduler.baselines.cloud_only import CloudOnly
from perllm.scheduler.baselines.cs_ucb_paper import CsUcbPaper
from perllm.scheduler.baselines.earliest_completion import EarliestCompletion
from perllm.scheduler.baselines.edge_only import EdgeOnly
from perllm.scheduler.baselines.fine_infer import FineInfer
from perllm.scheduler.baselines.least_loaded import LeastLoaded
from perllm.scheduler.baselines.lin_ucb import LinUcb
from perllm.scheduler.baselines.power_of_two import PowerOfTwo
from perllm.scheduler.baselines.random_choice import Random
from perllm.scheduler.baselines.rewardless_guidance import RewardlessGuidance
from perllm.scheduler.baselines.round_robin import RoundRobin
from perllm.scheduler.baselines.thompson import Thompson
from perllm.scheduler.baselines.ucb1 import Ucb1
from perllm.scheduler.baselines.with_admission import WithAdmission
from perllm.scheduler.core.policy import Policy
from perllm.scheduler.csucb.policy import CsUcb


def _agod(seed: int = 0, **options: Any) -> Policy:
    """AGOD: diffusion soft actor-critic over the nodes, trained as it goes; needs torch (Du et al., IEEE TMC 2024)."""
    try:
        from perllm.scheduler.baselines.agod import Agod  # noqa: PLC0415  torch is large and optional
    except ImportError:
        raise BadSetting("policy 'agod' needs torch: pip install 'perllm[agod]'") from None
    return Agod(seed, **options)


#: Baselines: each can also be had with MECHANISMS appended.
_BASELINES: dict[str, Callable[..., Policy]] = {
    "random": Random,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "power-of-two": PowerOfTwo,
    "edge-only": EdgeOnly,
    "cloud-only": CloudOnly,
    "fineinfer": FineInfer,
    "ucb1": Ucb1,
    "thompson": Thompson,
    "linucb": LinUcb,
    "cs-ucb-paper": CsUcbPaper,
    "rewardless-guidance": RewardlessGuidance,
    "cheapest-feasible": CheapestFeasible,
    "earliest-completion": EarliestCompletion,
    "agod": _agod,
}

#: Ends the name of a baseline that runs with CS-UCB's mechanisms.
MECHANISMS = "+mech"
#: What that adds, live and simulated alike. The ledger's leases count on the first three, so a live scheduler has them
#: under any name; a simulation of a plain name is of the baseline as published, without any of them.
MECHANISMS_ADDED = (
    "earliest deadline first",
    "short node queues",
    "late tasks dropped and stopped at their deadline",
    "admission (a task is placed once some node is forecast to finish it in time)",
)
#: Policies that always run with them.
_ALWAYS = ("cs-ucb", "informed", "foresight", "clairvoyant")


class CoreOptions(TypedDict):
    """The keywords of `SchedulerCore` that the mechanisms decide."""

    queue_beyond_slots: int | None
    edf: bool


class PolicyDescription(NamedTuple):
    """A policy for users: its name, and what it does in a sentence."""

    name: str
    sentence: str


def has_mechanisms(name: str) -> bool:
    """Whether a simulation runs this policy with the mechanisms."""
    return name.endswith(MECHANISMS) or name in _ALWAYS


def core_options(queue_beyond_slots: int, *, mechanisms: bool = True) -> CoreOptions:
    """With the mechanisms EDF, and node queues of at most `queue_beyond_slots` tasks; without, FIFO and unbounded."""
    return CoreOptions(queue_beyond_slots=queue_beyond_slots if mechanisms else None, edf=mechanisms)


def describe_policy(name: str) -> str:
    """What a policy does, in a sentence: the first of its class's docstring. Raises BadSetting for an unknown name."""
    text = inspect.cleandoc(_maker(name).__doc__ or "").split("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s(?=[A-Z`])", " ".join(text.split()), maxsplit=1)[0].replace("`", "")
    return sentence if not name.endswith(MECHANISMS) else f"{sentence} With {', '.join(MECHANISMS_ADDED)}."


def describe_policies() -> list[PolicyDescription]:
    """Every policy `make_policy` knows, those with MECHANISMS left out, the default first."""
    return [PolicyDescription(name, describe_policy(name)) for name in (CsUcb.name, *_BASELINES)]


def policy_names() -> tuple[str, ...]:
    """All names `make_policy` knows, those with MECHANISMS left out."""
    return (*_BASELINES, CsUcb.name)


def make_policy(name: str, seed: int = 0, **options: Any) -> Policy:
    """The policy of this name. `options` are the policy's own keywords.

    Raises BadSetting for an unknown name (listing those there are) or option.
    """
    maker = _maker(name)
    try:
        inspect.signature(maker).bind(seed, **options)
    except TypeError as error:
        raise BadSetting(f"policy {name!r}: {error}") from None
    policy = maker(seed, **options)
    return WithAdmission(policy) if name.endswith(MECHANISMS) else policy


def _maker(name: str) -> Callable[..., Policy]:
    maker = CsUcb if name == CsUcb.name else _BASELINES.get(name.removesuffix(MECHANISMS))
    if maker is None:
        raise BadSetting(f"policy: there is no {name!r}; choose one of {', '.join(policy_names())}")
    return maker
