"""How long outputs are, in the mean: all that the baselines learn of output lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

from perllm.broker.messages import Completed, Event, State
from perllm.scheduler.core.cluster import Task

#: Output length assumed for a class of which nothing has finished yet, as a share of `max_tokens`.
PRIOR_SHARE = 0.5


@dataclass(slots=True)
class MeanLength:
    """Mean output length per service class, tokens. `sums[class]` is [finished tasks, their tokens]."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    def snapshot(self) -> dict[str, list[float]]:
        """The sums, as JSON-able data of their own."""
        return {service: list(entry) for service, entry in self.sums.items()}

    @classmethod
    def restored(cls, state: dict[str, list[float]]) -> MeanLength:
        """From what `snapshot` returned."""
        return cls({service: [float(x) for x in entry] for service, entry in state.items()})

    def observe(self, event: Event, task: Task | None) -> None:
        """Count a task that ran to its end; one cut at its deadline says only that it was longer."""
        if isinstance(event, Completed) and task is not None and event.state is State.SUCCEEDED:
            entry = self.sums.setdefault(task.service, [0.0, 0.0])
            entry[0] += 1
            entry[1] += event.receipt.completion_tokens

    def tokens(self, task: Task) -> float:
        """Expected output of `task`, tokens."""
        count, total = self.sums.get(task.service, (0.0, 0.0))
        prior = task.max_tokens * PRIOR_SHARE
        return min((total + prior) / (count + 1), task.max_tokens)
