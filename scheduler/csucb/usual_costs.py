"""What a second of a node's busy time usually costs others: the mean over time of what it would have cost whoever was
decided about, in units of the index.

A task that need not run now compares the moment with it. Kept in an array, so that compiled code, which works the costs
out, can note them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from perllm.scheduler.core.compiled import compiled
from perllm.scheduler.csucb.rows import USUAL, Records, UsualRow

#: It is a mean over so many mean stays of a task.
STAYS = 4.0
#: A node's mean stay while nobody knows, s.
UNKNOWN_STAY = 1.0


class UsualCosts:
    """The costs of all nodes, as rows."""

    def __init__(self) -> None:
        self.rows: Records = np.zeros(8, USUAL)
        self._row_of: dict[str, int] = {}

    def row(self, node: str) -> int:
        """The row of a node by this name."""
        row = self._row_of.get(node)
        if row is None:
            row = self._row_of[node] = len(self._row_of)
            if row == len(self.rows):
                self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        return row

    def snapshot(self) -> dict[str, Any]:
        """[cost, when] by node."""
        return {node: list(self.rows.item(row)) for node, row in self._row_of.items()}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> UsualCosts:
        """Raises ValueError or TypeError for a foreign one."""
        costs = cls()
        for node, (cost, at) in state.items():
            row = costs.row(node)
            costs.rows[row] = float(cost), float(at)
        return costs


@compiled
def note(usual: UsualRow, cost: float, stay: float, now: float) -> None:
    """A second of the node's busy time would cost so much now; a task stays there for `stay` s (0: not known)."""
    if usual.at <= 0.0:
        usual.cost = cost
    else:
        lasting = STAYS * (stay if stay > 0.0 else UNKNOWN_STAY)
        usual.cost += (1.0 - math.exp(-max(now - usual.at, 0.0) / lasting)) * (cost - usual.cost)
    usual.at = max(now, usual.at)
