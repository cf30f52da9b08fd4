"""The ledger: where every task rests and every transition happens. See `ledger.lua` for the data model."""

from perllm.broker.ledger.ledger import (
    SAY_EVERY,
    Claim,
    Dispatch,
    End,
    Entry,
    Leader,
    Ledger,
    TaskRecord,
    entry,
    weight,
)

__all__ = ["SAY_EVERY", "Claim", "Dispatch", "End", "Entry", "Leader", "Ledger", "TaskRecord", "entry", "weight"]
