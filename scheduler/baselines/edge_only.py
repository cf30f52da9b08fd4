"""Edge only: the other tier is never used."""

from __future__ import annotations

from perllm.scheduler.baselines.one_tier import OneTier


class EdgeOnly(OneTier):
    """The least loaded edge node, never the cloud; waits while none has room."""

    name = "edge-only"
    tier = "edge"
