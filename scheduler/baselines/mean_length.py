"""How long outputs are, in the mean: all that the baselines learn of output lengths."""

from __future__ import annotations

from typing import Any

from perllm.broker.messages import Completed, Event, State
from perllm.scheduler.core.cluster import Task
from perllm.scheduler.core.service_classes import Classes

#: Output length assumed for a class of which nothing has finished yet: as a share of `max_tokens`, and of tasks whose
#: producers did not say that, in tokens.
PRIOR_SHARE, PRIOR_TOKENS = 0.5, 128


class MeanLength:
    """Mean length of an answer per service class, tokens. `sums` has [finished tasks, Σ tokens of their mean answers]
    of each class."""

    def __init__(self) -> None:
        self.sums: Classes[list[float]] = Classes(lambda: [0.0, 0.0])

    def snapshot(self) -> list[Any]:
        """[tenant, class, sums] of each class, as JSON-able data of their own."""
        return [[tenant, service, list(sums)] for tenant, service, sums in self.sums]

    @classmethod
    def restored(cls, state: list[Any]) -> MeanLength:
        """From what `snapshot` returned."""
        known = cls()
        for tenant, service, sums in state:
            known.sums.put(tenant, service, [float(x) for x in sums])
        return known

    def observe(self, event: Event, task: Task | None) -> None:
        """Count a task that ran to its end; one cut at its deadline says only that it was longer."""
        if not isinstance(event, Completed) or task is None or event.state is not State.SUCCEEDED:
            return
        if task.generates and not (task.fit_context and event.receipt.cut):
            entry = self.sums.get(task.tenant, task.service)
            entry[0] += 1
            entry[1] += event.receipt.completion_tokens / task.n

    def tokens(self, task: Task) -> float:
        """Expected length of each answer of `task`, tokens."""
        count, total = self.sums.get(task.tenant, task.service)
        prior = PRIOR_TOKENS if task.fit_context else task.max_tokens * PRIOR_SHARE
        return min((total + prior) / (count + 1), task.max_tokens)
