"""The ledger: where every task rests and every transition happens. See `ledger.lua` for the data model."""

from perllm.broker.ledger.events import gap, later
from perllm.broker.ledger.ledger import Ledger
from perllm.broker.ledger.records import (
    Claim,
    Dispatch,
    End,
    EndKind,
    Entry,
    Glance,
    Gone,
    Leader,
    Stored,
    TaskRecord,
    entry,
    is_id,
    weight,
)
from perllm.broker.ledger.scheduler import SWEEP_LIMIT
from perllm.broker.ledger.worker import SAY_TIME

__all__ = [
    "SAY_TIME",
    "SWEEP_LIMIT",
    "Claim",
    "Dispatch",
    "End",
    "EndKind",
    "Entry",
    "Glance",
    "Gone",
    "Leader",
    "Ledger",
    "Stored",
    "TaskRecord",
    "entry",
    "gap",
    "is_id",
    "later",
    "weight",
]
