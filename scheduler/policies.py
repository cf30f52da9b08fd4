"""Every policy by name, for the live service and the simulator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

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

#: Ends the name of a baseline that runs with the mechanisms CS-UCB has: EDF, short node queues, dropping late tasks,
#: abort at the deadline, admission. In the live service all but admission are always there.
MECHANISMS = "+mech"
#: Policies that always run with them.
_ALWAYS = ("cs-ucb", "informed", "clairvoyant")


def has_mechanisms(name: str) -> bool:
    """Whether a simulation of this policy gives it the mechanisms."""
    return name.endswith(MECHANISMS) or name in _ALWAYS


def policy_names() -> tuple[str, ...]:
    """All names `make_policy` knows, those with MECHANISMS left out."""
    return (*_BASELINES, CsUcb.name)


def make_policy(name: str, seed: int = 0, **options: Any) -> Policy:
    """The policy of this name. `options` are the policy's own keywords.

    Raises BadSetting for an unknown name (listing those there are) or option.
    """
    plain = name.removesuffix(MECHANISMS)
    maker = CsUcb if name == CsUcb.name else _BASELINES.get(plain)
    if maker is None:
        raise BadSetting(f"policy: there is no {name!r}; choose one of {', '.join(policy_names())}")
    try:
        inspect.signature(maker).bind(seed, **options)
    except TypeError as error:
        raise BadSetting(f"policy {name!r}: {error}") from None
    policy = maker(seed, **options)
    return policy if plain == name else WithAdmission(policy)
