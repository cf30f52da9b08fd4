"""Cloud only: the other tier is never used."""

from __future__ import annotations

from perllm.scheduler.baselines.one_tier import OneTier


class CloudOnly(OneTier):
    """The least loaded cloud node, never an edge; waits while none has room."""

    name = "cloud-only"
    tier = "cloud"
