"""Settings of the scheduler."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from perllm.broker.settings import Settings


class SchedulerSettings(Settings):
    """The settings of a scheduler."""

    policy: str = "cs-ucb"
    """Placement policy; `perllm policies` lists them."""
    queue_beyond_slots: Annotated[int, Field(ge=0, le=1_000)] = 2
    """Tasks a node's queue may hold beyond its slots."""
    snapshot_every: Annotated[float, Field(ge=0.1)] = 5.0
    """Seconds between snapshots of what was learned."""
    leader_ttl: Annotated[float, Field(ge=0.5, le=60)] = 3.0
    """Seconds after which a silent leader is followed by a standby."""
