"""Every policy by name, for the live service and the simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.errors import BadSetting
from scheduler.baselines.cs_ucb_paper import CsUcbPaper
from scheduler.baselines.least_loaded import LeastLoaded
from scheduler.baselines.round_robin import RoundRobin
from scheduler.core.policy import Policy

_MAKERS: dict[str, Callable[..., Policy]] = {
    "cs-ucb-paper": CsUcbPaper,
    "least-loaded": LeastLoaded,
    "round-robin": RoundRobin,
}


#: Ends the name of a baseline that runs with the mechanisms CS-UCB has: EDF, short node queues, dropping late tasks,
#: abort at the deadline, admission.
MECHANISMS = "+mech"
#: Policies that always run with them.
_ALWAYS = ("cs-ucb", "informed", "clairvoyant")


def has_mechanisms(name: str) -> bool:
    """Whether a simulation of this policy gives it the mechanisms. The live service always has them."""
    return name.endswith(MECHANISMS) or name in _ALWAYS


def policy_names() -> tuple[str, ...]:
    """All names `make_policy` knows."""
    return tuple(_MAKERS)


def make_policy(name: str, seed: int = 0, **options: Any) -> Policy:
    """The policy of this name. `options` are the policy's own keywords.

    Raises BadSetting for an unknown name (listing those there are) or option.
    """
    maker = _MAKERS.get(name)
    if maker is None:
        raise BadSetting(f"policy: there is no {name!r}; choose one of {', '.join(_MAKERS)}")
    try:
        return maker(seed, **options)
    except TypeError as error:
        raise BadSetting(f"policy {name!r}: {error}") from None
