"""Bounded names for what tasks are summed up by: tenant, service and model, each what a client may make up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from perllm.broker.messages import MAX_NAME
from perllm.broker.metrics import OTHER

Names = tuple[str, str, str]

#: Tenants with a name of their own; groups of one tenant, and of all: beyond, a tenant's are summed up as one.
MAX_TENANTS, MAX_OF_TENANT, MAX_GROUPS = 64, 16, 256
#: A group that was not used for so long, s, may make room for another.
IDLE = 3600.0


class TaskGroups:
    """Gives each group a number and bounded names. `known_model` says whether a model is one that a node has."""

    def __init__(self, known_model: Callable[[str], bool]) -> None:
        self._known_model = known_model
        self._numbers: dict[Names, int] = {}
        self._names: dict[int, Names] = {}
        self._used: dict[int, float] = {}
        self._of_tenant: Counter[str] = Counter()
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, tenant: str, service: str, model: str | None, now: float) -> int:
        """The number of a task's group. `model` None: any will do."""
        model = "auto" if model is None else model if self._known_model(model) else OTHER
        number = self._numbers.get((tenant, service, model))
        if number is None:
            number = self._bounded(tenant, service, model)
        self._used[number] = now
        return number

    def names(self, number: int) -> Names:
        """The names of a group: tenant, service, model."""
        return self._names.get(number, (OTHER, OTHER, OTHER))

    def _bounded(self, tenant: str, service: str, model: str) -> int:
        if len(tenant) > MAX_NAME or (tenant not in self._of_tenant and len(self._of_tenant) >= MAX_TENANTS):
            tenant = OTHER
        if len(service) > MAX_NAME:
            service = OTHER
        full = tenant == OTHER or self._of_tenant[tenant] >= MAX_OF_TENANT or len(self._numbers) >= MAX_GROUPS
        names = (tenant, OTHER, OTHER) if full else (tenant, service, model)
        return self._numbered(names)

    def _numbered(self, names: Names) -> int:
        number = self._numbers.get(names)
        if number is None:
            number = self._free.pop() if self._free else len(self._names)
            self._numbers[names], self._names[number] = number, names
            self._of_tenant[names[0]] += 1
        return number

    def keep(self, names: Names, now: float) -> None:
        """Take up a group of an earlier run, with the very names it had then."""
        self._used[self._numbered(names)] = now

    def forget_idle(self, now: float, waiting: Collection[int]) -> None:
        """Where little room is left, forget the groups that were not used for IDLE s and have nothing waiting."""
        if len(self._numbers) < MAX_GROUPS // 2 and len(self._of_tenant) < MAX_TENANTS // 2:
            return
        for number in [n for n, used in self._used.items() if now - used > IDLE and n not in waiting]:
            names = self._names.pop(number)
            del self._numbers[names], self._used[number]
            self._free.append(number)
            self._of_tenant[names[0]] -= 1
            if not self._of_tenant[names[0]]:
                del self._of_tenant[names[0]]

    def __contains__(self, names: object) -> bool:
        return names in self._numbers
