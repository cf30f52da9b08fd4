"""What is kept per service class: apart for each tenant, so that nobody learns of another's, and bounded, so that who
makes up ever new classes loses his own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

#: Classes kept of one tenant, and of all.
TENANT_CLASSES, MOST_CLASSES = 64, 1000

T = TypeVar("T")


class Classes(Generic[T]):
    """One `T` for each (tenant, service class), made when first asked for. Beyond the bounds the class that was asked
    for longest ago goes: the tenant's own, or, if all together are too many, one of the tenant that has the most."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._of: dict[str, dict[str, T]] = {}  # tenant → class → what is kept, in the order last asked for
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, str, T]]:
        """(tenant, class, what is kept), of each tenant the one asked for longest ago first."""
        return ((tenant, name, kept) for tenant, mine in self._of.items() for name, kept in mine.items())

    def get(self, tenant: str, name: str) -> T:
        """What is kept of a class."""
        mine = self._of.get(tenant)
        if mine is not None and name in mine:
            kept = mine[name] = mine.pop(name)
            return kept
        return self.put(tenant, name, self._make())

    def put(self, tenant: str, name: str, kept: T) -> T:
        """Keep this of a class there was none of."""
        mine = self._of.setdefault(tenant, {})
        mine[name] = kept
        self._count += 1
        if len(mine) > TENANT_CLASSES:
            self._drop(tenant)
        elif self._count > MOST_CLASSES:
            self._drop(max(self._of, key=lambda each: len(self._of[each])))
        return kept

    def _drop(self, tenant: str) -> None:
        mine = self._of[tenant]
        del mine[next(iter(mine))]
        self._count -= 1
        if not mine:
            del self._of[tenant]
