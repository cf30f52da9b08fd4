"""The pending pool: unfinished tasks that are on no node, most urgent first."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from scheduler.core.cluster import Task


class Pending:
    """A priority pool of tasks, ordered by deadline (EDF) or by arrival (FIFO).

    `add`, `remove` and `pop` cost O(log n). Removal is lazy: the heap keeps a dead entry until it surfaces.
    """

    def __init__(self, *, edf: bool = True) -> None:
        self._edf = edf
        self._tasks: dict[str, Task] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._tasks

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    def get(self, task_id: str) -> Task | None:
        return self._tasks.get(task_id)

    def add(self, task: Task) -> None:
        if task.id not in self._tasks:
            self._tasks[task.id] = task
            heapq.heappush(self._heap, (self._key(task), task.id))

    def remove(self, task_id: str) -> Task | None:
        return self._tasks.pop(task_id, None)

    def pop(self) -> Task | None:
        """Take the most urgent task out; None when empty."""
        while self._heap:
            key, task_id = heapq.heappop(self._heap)
            task = self._tasks.get(task_id)
            if task is not None and self._key(task) == key:
                del self._tasks[task_id]
                return task
        return None

    def _key(self, task: Task) -> float:
        return task.deadline if self._edf else task.submitted
