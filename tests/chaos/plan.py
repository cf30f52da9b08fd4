"""Which blows fall on whom, drawn from a seed: the same seed gives the same blows, whoever suffers them."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple, cast

from chaos.history import Fsync

Role = Literal["worker", "scheduler", "producer", "api", "server"]
How = Literal["kill", "freeze", "terminate", "power_cut"]

#: How often each role is hit, and how each is: kill (SIGKILL), freeze (SIGSTOP, later SIGCONT), terminate (SIGTERM and
#: a new start), power_cut (SIGKILL, and the append-only file loses what it was not promised to keep).
_ROLES: dict[Role, float] = {"worker": 0.45, "scheduler": 0.2, "producer": 0.1, "api": 0.05, "server": 0.2}
_HOWS: dict[Role, dict[How, float]] = {
    "worker": {"kill": 0.5, "freeze": 0.25, "terminate": 0.25},
    "scheduler": {"kill": 0.5, "freeze": 0.25, "terminate": 0.25},
    "producer": {"kill": 0.7, "freeze": 0.3},
    "api": {"kill": 0.5, "freeze": 0.25, "terminate": 0.25},
    "server": {"kill": 0.35, "power_cut": 0.35, "freeze": 0.15, "terminate": 0.15},
}
#: Seconds before a killed process is started again; and frozen, short of a lease or well beyond it.
_AWAY = (0.0, 1.5)
_FROZEN: dict[Role, tuple[tuple[float, float], ...]] = {
    "worker": ((0.2, 2.0), (5.0, 7.0)),
    "scheduler": ((0.2, 2.0), (4.0, 6.0)),
    "producer": ((0.2, 2.0),),
    "api": ((0.2, 2.0), (4.0, 6.0)),
    "server": ((0.2, 2.0),),
}


class Blow(NamedTuple):
    """One thing done to one process."""

    wait: float  # s after the blow before
    role: Role
    how: How
    pick: float  # 0 to 1: which of those of this role that are up
    pause: float  # s it is away, or frozen
    fsync: Fsync  # of the server, when it is started again
    cut: float  # 0 to 1: how much of what a power cut may take it takes

    @property
    def kind(self) -> str:
        return f"{self.role}.{self.how}"


def plan(seed: int, count: int, gap: float, only: str | None = None) -> list[Blow]:
    """So many blows, on average `gap` s apart; of `only` one kind, if given. The first ones meet every role."""
    rng = random.Random(seed)
    if only is not None:
        role, how = only.split(".")
        return [_blow(rng, cast("Role", role), gap, cast("How", how)) for _ in range(count)]
    roles = list(_ROLES)
    order = [rng.choices(roles, list(_ROLES.values()))[0] for _ in range(count)]
    order[: len(roles)] = rng.sample(roles, len(roles))[:count]
    return [_blow(rng, role, gap) for role in order]


def _blow(rng: random.Random, role: Role, gap: float, how: How | None = None) -> Blow:
    how = how or rng.choices(list(_HOWS[role]), list(_HOWS[role].values()))[0]
    pause = rng.uniform(*(rng.choice(_FROZEN[role]) if how == "freeze" else _AWAY))
    fsync: Fsync = rng.choice(("always", "everysec"))
    return Blow(min(rng.expovariate(1 / gap), 3 * gap), role, how, rng.random(), pause, fsync, rng.random())
