"""Request bodies: JSON objects within bounds, and what every endpoint checks in the same way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastapi import Request
from pydantic_core import from_json

from perllm.broker.api.errors import ApiError

#: Most fields of a body, and values of all kinds in it, about: each costs many times its bytes while it is checked.
MAX_FIELDS, MAX_VALUES = 200, 500_000


async def read_json(request: Request) -> dict[str, Any]:
    """The body, a JSON object. Raises ApiError."""
    raw = await request.body()
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ApiError(413, f"the body has more than {MAX_VALUES} values: send several requests")
    try:
        # The reader of what is stored, too: nested too deeply, or with half a surrogate pair, it is no JSON for both.
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    if len(body) > MAX_FIELDS:
        raise ApiError(400, f"the body has {len(body)} fields; the limit is {MAX_FIELDS}", code="invalid_json")
    return body


def refuse_unknown(body: Mapping[str, Any], fields: Collection[str]) -> None:
    """Raises ApiError for a field of the body that is none of these."""
    if unknown := set(body) - set(fields):
        raise ApiError(400, f"{min(unknown)}: not a field of this request", param=min(unknown))


def flag(body: dict[str, Any], name: str) -> bool:
    """A field that is true or false; false unless given. Raises ApiError."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name}: true or false is required", param=name)
    return bool(value)
