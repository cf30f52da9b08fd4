"""Lists with cursors, as OpenAI's are."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query

Limit = Annotated[int, Query(ge=1, le=100, description="At most so many.")]
After = Annotated[str | None, Query(max_length=256, description="The last id of the page before.")]
Order = Annotated[str, Query(pattern="^(asc|desc)$", description="By the time they were made: `desc` is newest first.")]


def page(items: list[dict[str, Any]], more: bool, last: str | None = None) -> dict[str, Any]:
    """A page of a list; `last` is where the next one begins, if not after the last item."""
    return {
        "object": "list",
        "data": items,
        "has_more": more,
        "first_id": items[0]["id"] if items else None,
        "last_id": last or (items[-1]["id"] if items else None),
    }
