"""Random JSON schemas of tools' parameters, by hypothesis: what the OpenAI API documents, and more."""

from __future__ import annotations

import keyword
from typing import Any

from hypothesis import strategies as st

Schemas = st.SearchStrategy[Any]
NAMES = st.from_regex(r"[a-z][a-z_]{0,9}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
TEXTS = st.text(st.characters(codec="utf-8", max_codepoint=0x1FFFF), max_size=10)
SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-6e4, 6e4, width=16) | TEXTS
PATTERNS = (
    *("^[A-Z]{2}[0-9]{4}$", r"^\d{4}-\d{2}-\d{2}$", "^[a-z]+(-[a-z]+)*$", "^(yes|no|maybe)$", "[aeiou]"),
    *(r"^\S+@\S+$", "^#[0-9a-f]{6}$"),
)
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def some(**fields: Schemas) -> Schemas:
    """An object with any of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


STRINGS = st.one_of(
    some(minLength=st.integers(0, 5), maxLength=st.integers(5, 60), description=TEXTS).map(
        lambda bounds: {"type": "string", **bounds}
    ),
    st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
)
NUMBERS = st.builds(
    lambda kind, bounds: {"type": kind, **bounds},
    st.sampled_from(["integer", "number"]),
    some(minimum=st.integers(-1000, 0), maximum=st.integers(1, 10**6))
    | some(
        exclusiveMinimum=st.integers(-100, 0),
        exclusiveMaximum=st.integers(1000, 10**5),
        multipleOf=st.sampled_from([1, 2, 5, 10, 25]),
    ),
)
LEAVES = st.one_of(
    STRINGS,
    STRINGS,
    NUMBERS,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, True]),
    st.lists(SCALARS, min_size=1, max_size=6, unique_by=repr).map(lambda values: {"enum": values}),
    (SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(NAMES, SCALARS, max_size=3)).map(
        lambda value: {"const": value}
    ),
    st.lists(
        st.sampled_from(["string", "integer", "boolean", "null", "number"]), min_size=1, max_size=3, unique=True
    ).map(lambda kinds: {"type": kinds}),
)


@st.composite
def objects(draw: st.DrawFn, inner: Schemas) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=5))
    made = {"type": "object", "properties": properties, "required": [n for n in properties if draw(st.integers(0, 3))]}
    more = draw(st.sampled_from([False, False, False, True, None]))
    return made if more is None else {**made, "additionalProperties": more}


def composed(inner: Schemas) -> Schemas:
    lengths = some(minItems=st.integers(0, 2), maxItems=st.integers(2, 6))
    return st.one_of(
        objects(inner),
        st.builds(lambda items, bounds: {"type": "array", "items": items, **bounds}, inner, lengths),
        st.builds(
            lambda first, rest: {"type": "array", "prefixItems": first, "items": rest},
            st.lists(inner, min_size=1, max_size=3),
            st.just(False) | inner,
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        inner.map(lambda values: {"type": "object", "additionalProperties": values}),
    )


@st.composite
def parameters(draw: st.DrawFn, leaves: int = 8) -> dict[str, Any]:
    """A tool's, at times with a part that contains itself."""
    made = draw(objects(st.recursive(LEAVES, composed, max_leaves=leaves)))
    if draw(st.integers(0, 4)) == 4:
        following = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        node = {"type": "object", "properties": {"value": draw(LEAVES), "next": following}}
        node |= {"required": ["value", "next"], "additionalProperties": False}
        made = {**made, "$defs": {"node": node}, "properties": {**made["properties"], "tree": {"$ref": "#/$defs/node"}}}
        made["required"] = [*made["required"], "tree"]
    return made
