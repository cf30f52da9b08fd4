"""Grammars, JSON schemas and JSON texts that are too much for somebody, drawn from a seed. Pure."""

from __future__ import annotations

import random
import string
from typing import Any

#: Longest grammar the API takes, characters.
_MOST = 65_536


# --- GBNF


def nested(rng: random.Random) -> str:
    """Brackets within brackets, in the open and where a careless count takes them for something else."""
    depth = int(10 ** rng.uniform(1.5, 4.4))
    core = rng.choice(['"a"', "[a]", "[)]", '")"', '"a"*', "[^(]", '"\\x29"', "."])
    around = rng.choice(["plain", "classes", "literals", "comments", "quantified"])
    match around:
        case "classes":
            each = min(rng.choice([8, 64, 500]), depth)
            text = ("(" * each + "[" + ")" * each + "]") * (depth // each)
        case "literals":
            each = min(rng.choice([8, 64, 500]), depth)
            text = ("(" * each + ' "' + ")" * each + '" ') * (depth // each)
        case "comments":
            each = min(rng.choice([8, 64]), depth)
            text = ("(" * each + f" # {')' * each}\n") * (depth // each) + core
        case "quantified":
            depth = min(depth, 4000)
            text = "(" * depth + core + f"){rng.choice(['?', '*', '+', '{2}', '{0,3}'])}" * depth
        case _:
            text = "(" * depth + core + ")" * depth
    return f"root ::= {text}"[:_MOST]


def ambiguous(rng: random.Random) -> str:
    """One text, very many derivations."""
    n = int(10 ** rng.uniform(1, 3.9))
    atom = rng.choice(['"a"', "[a-z]", ".", '("a" | "a")', '("a" | "aa")', '("a"*)', "x", '"" "a"'])
    mark = rng.choice(["?", "*", "+", "{0,5}"])
    text = " ".join([atom + mark] * n)
    shape = rng.choice([text, f"({text})*", f"({text}) | ({text})", f"({text})+ ({text})+"])
    return f'root ::= {shape}\nx ::= "a" | "b" | y\ny ::= "a"? "b"?'[:_MOST]


def repeated(rng: random.Random) -> str:
    """Repetitions, side by side and of each other."""
    n = rng.choice([100, 2000, 65_535, 2**31 - 1, 2**31, 2**63, 10**20])
    match rng.choice(["one", "many", "nested", "range", "rules"]):
        case "one":
            return f'root ::= "x"{{{n}}}'
        case "many":
            return "root ::= " + f'"x"{{{min(n, 2000)}}} ' * rng.choice([10, 900, 4000])
        case "range":
            return f'root ::= "x"{{{rng.choice([0, 1, n])},{n}}} "y"{{,}} "z"{{{n},0}}'
        case "nested":
            return "root ::= " + "(" * 20 + '"x"' + f"){{{rng.choice([2, 9, 50])}}}" * rng.randint(3, 20)
        case _:
            levels = rng.randint(5, 40)
            rules = [f"r{i} ::= {f'r{i + 1} ' * rng.choice([2, 10])}" for i in range(levels)]
            return "\n".join(["root ::= r0", *rules, f'r{levels} ::= "x"'])


def recursive(rng: random.Random) -> str:
    """Rules that lead into themselves, or nowhere."""
    return rng.choice([
        "root ::= root",
        'root ::= root "a" | "a"',
        'root ::= "a" root | "a" root | "b"',
        "root ::= a\na ::= b\nb ::= a",
        'root ::= a? root b?\na ::= ""\nb ::= ""',
        'root ::= ("")*',
        'root ::= (("")*)*',
        'root ::= ("" | "a"?)+',
        "root ::= missing",
        'noroot ::= "a"',
        "root ::= ",
        'root ::= "',
        "root ::= [",
        "root ::= [z-a]",
        "root ::= [^\\x00-\\U0010FFFF]",
        "root ::= \\",
        'root ::= "a"{',
        "root ::= " + "a " * 30_000 + '\na ::= ""',
        "\n".join(f'root{i} ::= root{(i + 1) % 900} | "a"' for i in range(900)) + "\nroot ::= root0",
    ])  # fmt: skip


def noisy(rng: random.Random) -> str:
    """What looks like a grammar, with a few characters changed."""
    text = list(rng.choice([nested, ambiguous, repeated, recursive])(rng)[:4000])
    alphabet = '()[]{}"\\|*+?^-:=#\n\t ,.0aé\u2028\ufeff\x00😀<>!'
    for _ in range(rng.randint(1, 40)):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randint(0, 2)] = rng.choice(alphabet)
    return "".join(text)


# --- JSON schemas


def bounded(rng: random.Random) -> dict[str, Any]:
    """Bounds beyond measure."""
    n = rng.choice([1000, 10**5, 8 * 10**7, 2 * 10**8, 4 * 10**8, 2**31, 2**63, 10**30, -1, 0.5, "9"])
    return rng.choice([
        {"type": "string", "minLength": n},
        {"type": "string", "maxLength": n},
        {"type": "string", "minLength": n, "maxLength": n},
        {"type": "array", "items": {"type": "integer"}, "minItems": n},
        {"type": "array", "items": {"type": "string", "minLength": 2000}, "minItems": 2000, "maxItems": n},
        {"type": "array", "prefixItems": [{"type": "null"}] * 3000},
        {"type": "integer", "minimum": -n if isinstance(n, int) else n, "maximum": n},
        {"type": "integer", "minimum": 10**300, "maximum": 10**301},
        {"type": "number", "multipleOf": 1e-300, "exclusiveMinimum": n},
        {"type": "object", "minProperties": n, "maxProperties": n, "additionalProperties": True},
    ])  # fmt: skip


def deep(rng: random.Random) -> dict[str, Any]:
    """Schemas within schemas."""
    schema: dict[str, Any] = {"type": "string"}
    way = rng.choice(["properties", "items", "anyOf", "allOf", "not", "mixed"])
    for _ in range(rng.choice([64, 100, 150, 199, 200, 220, 255, 256, 300, 480, 900])):
        match rng.choice(["properties", "items", "anyOf"]) if way == "mixed" else way:
            case "properties":
                schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
            case "items":
                schema = {"type": "array", "items": schema}
            case "not":
                schema = {"not": schema}
            case several:
                schema = {several: [schema]}
    return schema


def referring(rng: random.Random) -> dict[str, Any]:
    """References: in circles, far away, and of many to many."""
    levels, width = rng.randint(3, 30), rng.randint(2, 12)
    laughs: dict[str, Any] = {
        f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * width} for i in range(levels)
    }
    unions = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * width} for i in range(levels)}
    end = {f"d{levels}": {"type": "string"}}
    return rng.choice([
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "https://127.0.0.3/schema.json#/x"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "#/" + "a/" * 5000},
        {"$ref": "#/$defs/d0", "$defs": laughs | end},
        {"$ref": "#/$defs/d0", "$defs": unions | end},
    ])  # fmt: skip


def patterned(rng: random.Random) -> dict[str, Any]:
    """Patterns, lists of values and mixtures that are much work."""
    n = rng.choice([50, 1000, 100_000, 2**31])
    pattern = rng.choice([
        "^(a+)+$", "^(a|a)*$", f"^a{{{n}}}$", f"^(a{{{min(n, 1000)}}}){{{min(n, 1000)}}}$", f"^[a-z]{{{n},}}$",
        "^" + "(" * min(n, 9000) + "a" + ")" * min(n, 9000) + "$", "^(?=a)b$", "^\\p{L}+$", "^(?:a?){40}a{40}$", "[",
        "^(" + "|".join(f"a{i}" for i in range(min(n, 5000))) + ")*$", "\\", "^.{0,1000000}$", "(?R)", "\ud83d",
    ])  # fmt: skip
    many = [f"{i}{'x' * rng.choice([1, 20])}" for i in range(2000)]
    return rng.choice([
        {"type": "string", "pattern": pattern},
        {"type": "string", "pattern": pattern},
        {"type": "string", "format": rng.choice(["date-time", "uuid", "regex", "nonsense"])},
        {"enum": many},
        {"const": "x" * 60_000},
        {"type": "object", "properties": {name: {"type": "string"} for name in many}},
        {"type": "object", "patternProperties": {pattern: {"type": "integer"}}},
        {"allOf": [{"properties": {name: {"enum": many[:3]}}} for name in many[:300]]},
        {"anyOf": [{"type": "object", "properties": {name: {}}, "required": [name]} for name in many[:900]]},
        {"type": ["string", "integer", "array", "object", "null"] * 50},
        {"type": 7},
        {"if": {"$ref": "#"}, "then": {"$ref": "#"}, "else": {"$ref": "#"}},
    ])  # fmt: skip


# --- JSON


def odd_value(rng: random.Random) -> str:
    """One JSON value as text, of a kind nobody reckons with; not always JSON."""
    n = int(10 ** rng.uniform(2, 5.5))
    return rng.choice([
        "NaN", "-Infinity", "1e999", "-0.0", "1" + "0" * min(n, 6000), "-" + "9" * 30, "0.1e-400", "null", "true", '""',
        '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\u202e"', f'"{"x" * min(n, 300_000)}"', "[]", "{}", "[[]]",
        "[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n, "[" + "0," * n + "0]", '{"a":1,"a":2}',
        '"' + "".join(rng.choices(string.printable.replace('"', "").replace("\\", ""), k=60)) + '"',
    ])  # fmt: skip
