"""The index CS-UCB maximises: what one more task on a node is worth, in units of on-time value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from perllm.scheduler.core.compiled import compiled

#: The harm a task does counts this many times: once for the tasks that are there, and once for those that come while it
#: is there. In a steady state a task meets as many of the latter as of the former.
HARM_FACTOR = 2.0
#: E₀ in mean energies of finished tasks, each where it costs least: with V = 4, an on-time task is worth ten of them.
SCALE_FACTOR = 2.5
#: Weight of a finished task's energy in their mean.
TASK_ENERGY_WEIGHT = 0.02


@compiled
def index(weight: float, gained: float, lost: float, joules: float, scale: float, slot_cost: float) -> float:
    """V·ΔS − ΔE/E₀ − price·Δslot (docs/architecture.md, "The index").

    ΔS is the on-time value `gained` less what others lose: `weight` V, `lost` as `forecast.harm` has it for the tasks
    there now; `joules` ΔE, marginal; `scale` E₀ (J); `slot_cost` what its time in a slot costs.
    """
    return weight * (gained - lost) - joules / scale - slot_cost


@dataclass(slots=True)
class EnergyScale:
    """E₀: follows the energy of finished tasks, so that V means the same on a phone and on a rack."""

    mean: float = 0.0  # J of a task; 0: nothing known

    def suggest(self, joules: float) -> bool:
        """A forecast, for as long as nothing was measured. Whether it was taken."""
        if self.mean > 0 or not 0 < joules < math.inf:
            return False
        self.mean = joules
        return True

    def observe(self, joules: float) -> None:
        """A task finished that would have cost so much where it costs least: what was dear must not make energy cheap
        for the next."""
        self.mean = self.mean + TASK_ENERGY_WEIGHT * (joules - self.mean) if self.mean > 0 else joules

    @property
    def joules(self) -> float:
        """E₀, J; where energy is unknown, so much that it does not count."""
        return SCALE_FACTOR * self.mean if self.mean > 1e-9 else 1e18

    def snapshot(self) -> dict[str, Any]:
        return asdict(self)
