"""What a JSON schema says beyond what llguidance keeps to, refused before it is compiled.

llguidance refuses most of what it cannot do by itself. The rest was found by comparing what it lets through with a
validator, over random schemas (`make bench-tools`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: The formats JSON Schema defines. All others are notes to people: nobody checks them, so neither need the grammar.
FORMATS = (
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
    *("uri", "uri-reference", "iri", "iri-reference", "uri-template", "uuid", "regex"),
    *("json-pointer", "relative-json-pointer"),
)
#: Significant digits of a number that survive being read and written.
DIGITS = 15
_LARGEST = 10**22
#: Planes of Unicode in which nothing is assigned: some vocabularies lack their bytes.
_UNASSIGNED = re.compile("[\U00040000-\U000bffff]")
#: Keywords whose value is a schema, a list of them, or schemas by name.
_ONE = ("additionalProperties", "additionalItems", "contains", "else", "if", "items", "not", "propertyNames", "then")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
#: What says nothing of values.
_NOTES = frozenset({
    *("$comment", "$defs", "$id", "$schema", "default", "definitions", "description", "examples", "title"),
})  # fmt: skip
#: Keywords of schemas in which a narrower part makes the whole narrower, and no part needs what another forbids.
_PLAIN = _NOTES | {
    *("additionalProperties", "const", "enum", "format", "items", "pattern", "properties", "required", "type"),
    *("exclusiveMaximum", "exclusiveMinimum", "maxItems", "maxLength", "maximum", "minItems", "minLength", "minimum"),
    "multipleOf",
}


class BadSchema(ValueError):
    """It cannot be kept to; the message says where (a JSON pointer) and why."""


def prepared(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without what nobody checks, and where all of it is plain, with objects that have only what it lists:
    a small model would go on with names of its own for ever. Raises BadSchema. Recurses as deep as the schema, which is
    at most `MAX_DEPTH`."""
    out = _prepared(schema, "#")
    if all(_is_plain(part) for part in _parts(out)):
        for part in _parts(out):
            if _lists_all(part):
                part["additionalProperties"] = False
    return out


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it."""
    left = [schema]
    while left:
        part = left.pop()
        inner = [part.get(keyword) for keyword in _ONE]
        for keyword in _LISTS:
            inner += found if isinstance(found := part.get(keyword), list) else []
        for keyword in _BY_NAME:
            inner += found.values() if isinstance(found := part.get(keyword), dict) else []
        left += [each for each in inner if isinstance(each, dict)]
        yield part


def _is_plain(part: Mapping[str, Any]) -> bool:
    beside = part.keys() - _NOTES
    return part.keys() <= _PLAIN or beside in ({"anyOf"}, {"$ref"})


def _lists_all(part: Mapping[str, Any]) -> bool:
    """Whether it lists an object's properties, among them all that must be there, and says nothing of others."""
    listed, required = part.get("properties"), part.get("required", [])
    if not isinstance(listed, dict) or not isinstance(required, list):
        return False
    if part.keys() & {"additionalProperties", "const", "enum"}:
        return False
    return all(isinstance(name, str) and name in listed for name in required)


def _prepared(schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    out = dict(schema)
    if isinstance(name := out.get("format"), str) and name not in FORMATS:
        del out["format"]
    if out.get("uniqueItems") is False:
        del out["uniqueItems"]
    _check(out, where)
    for keyword in _ONE:
        if isinstance(value := out.get(keyword), dict):
            out[keyword] = _prepared(value, f"{where}/{keyword}")
    for keyword in _LISTS:
        if isinstance(value := out.get(keyword), list):
            out[keyword] = [
                _prepared(one, f"{where}/{keyword}/{number}") if isinstance(one, dict) else one
                for number, one in enumerate(value)
            ]
    for keyword in _BY_NAME:
        if isinstance(value := out.get(keyword), dict):
            out[keyword] = {
                name: _prepared(one, f"{where}/{keyword}/{name}") if isinstance(one, dict) else one
                for name, one in value.items()
            }
    return out


def _check(schema: Mapping[str, Any], where: str) -> None:
    for keyword in ("const", "enum", "properties", "required"):
        exact = schema.get(keyword)
        exact = list(exact) if keyword == "properties" and isinstance(exact, dict) else exact
        for value in _leaves(exact):
            if isinstance(value, str) and _UNASSIGNED.search(value):
                raise BadSchema(f"{where}/{keyword}: U+40000 to U+BFFFF are no characters: not every model spells them")
            if isinstance(value, int | float) and not _kept(value):
                raise BadSchema(f"{where}/{keyword}: a number of more than {DIGITS} digits is not kept: shorten it")
    if isinstance(step := schema.get("multipleOf"), float) and len(_digits(step)) > DIGITS // 2:
        raise BadSchema(f"{where}/multipleOf: {step!r} has too many digits: round it")
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    free = schema.get("additionalProperties") is not False or schema.get("patternProperties")
    if isinstance(least, int | float) and least > named + 1 and free:
        raise BadSchema(f"{where}/minProperties: names that the schema does not list may repeat: list what is required")


def _leaves(value: Any) -> Iterator[Any]:
    """The texts (also keys), numbers and words in a value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
        else:
            yield one


def _kept(number: int | float) -> bool:
    """Whether a number is the same once it was read and written."""
    if isinstance(number, int):
        return abs(number) < 2**53
    return number == 0 or (len(_digits(number)) <= DIGITS and 1 / _LARGEST < abs(number) < _LARGEST)


def _digits(number: float) -> str:
    """The significant digits of a number as it is written."""
    return json.dumps(number).lower().partition("e")[0].replace(".", "").replace("-", "").strip("0")
