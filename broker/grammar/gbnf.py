"""GBNF (llama.cpp's grammars) as Lark (llguidance's dialect of it).

Pure, without recursion, linear in the text. Every terminal of the result is one character: llguidance's lexer takes
the longest terminal it can, so longer ones ("ab" beside [a-z]) would rule out texts which GBNF allows.

Sources: llama.cpp, grammars/README.md; llguidance, docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

#: Parentheses may be nested so deep.
MAX_NESTING = 64
#: Most repetitions that can be written, digits.
_DIGITS = 9

_TOKEN = re.compile(
    r"""
    (?P<blank>   [ \t]+ | \#[^\r\n]* )
  | (?P<newline> \r\n | \r | \n )
  | (?P<define>  ::= )
  | (?P<name>    [A-Za-z0-9_-]+ )
  | (?P<literal> "(?:[^"\\]|\\.)*" )
  | (?P<class>   \[(?:[^\]\\]|\\.)*\] )
  | (?P<times>   \{[ \t]*[0-9]+[ \t]*(?:,[ \t]*[0-9]*[ \t]*)?\} )
  | (?P<mark>    [()|*+?.] )
    """,
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {c: c for c in '\\"[]'}
_ANY = "/(?s:.)/"


class BadGBNF(ValueError):
    """It is not GBNF; the message says where and why."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int  # character of the grammar


@dataclass(slots=True)
class _Rule:
    """One rule as it is written out. `open` holds, for every group that is open, where it began; `last` is where the
    item began that a repetition would repeat."""

    name: str
    out: list[str] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    last: int | None = None
    filled: bool = False  # the present alternative has an item

    def add(self, text: str) -> None:
        self.last, self.filled = len(self.out), True
        self.out.append(text)

    def end_alternative(self) -> None:
        if not self.filled:
            self.out.append('""')
        self.last, self.filled = None, False


def to_lark(text: str, start: str = "start") -> str:
    """The grammar `text` in Lark, its rule `root` as `start`. Raises BadGBNF."""
    tokens = [token for token in _tokens(text) if token.kind != "blank"]
    begins = {
        number
        for number, (token, following) in enumerate(pairwise(tokens))
        if token.kind == "name"
        and following.kind == "define"
        and (number == 0 or tokens[number - 1].kind == "newline")
        and not _continues(tokens, number)
    }
    names = {"root": start}
    for number in sorted(begins):
        names.setdefault(tokens[number].text, f"r{len(names)}")
    rules: list[_Rule] = []
    for number, token in enumerate(tokens):
        rule = rules[-1] if rules else None
        if number in begins and not (rule and rule.open):
            if rule is not None:
                rule.end_alternative()
            rules.append(_Rule(token.text))
        elif token.kind == "define":
            if number - 1 not in begins or (rule and rule.open):
                raise _error(text, token, "a rule begins on a line of its own, with its name before ::=")
        elif rule is None:
            if token.kind != "newline":
                raise _error(text, token, "a rule begins with its name and ::=")
        elif token.kind == "newline":
            continue
        else:
            if tokens[number - 1].kind == "newline" and not rule.open and not _continues(tokens, number):
                raise _error(text, token, "a rule begins with its name and ::=")
            _take(text, rule, token, names)
    for rule in rules:
        if rule.open:
            raise BadGBNF(f"expecting ')' at the end of the rule {rule.name[:60]!r}")
    if not any(rule.name == "root" for rule in rules):
        raise BadGBNF("there is no rule named 'root'")
    for name, times in Counter(rule.name for rule in rules).items():
        if times > 1:
            raise BadGBNF(f"the rule {name[:60]!r} is there {times} times: join its alternatives with |")
    rules[-1].end_alternative()
    return "\n".join(f"{names[rule.name]}: {' '.join(rule.out)}" for rule in rules)


def _continues(tokens: list[_Token], number: int) -> bool:
    """Whether a token on a new line still belongs to the rule before: after `|`, and after `::=` unless it begins one
    itself."""
    while number and tokens[number - 1].kind == "newline":
        number -= 1
    return number > 0 and (tokens[number - 1].kind == "define" or tokens[number - 1].text == "|")


def _take(text: str, rule: _Rule, token: _Token, names: dict[str, str]) -> None:
    """Write one token of a rule's right side."""
    match token.kind, token.text:
        case "name", name:
            if name not in names:
                raise _error(text, token, f"there is no rule named {name[:60]!r}")
            rule.add(names[name])
        case "literal", _:
            characters = [quoted(c) for c in _characters(text, token)]
            rule.add(characters[0] if len(characters) == 1 else f"({' '.join(characters)})" if characters else '""')
        case "class", _:
            rule.add(_class(text, token))
        case _, ".":
            rule.add(_ANY)
        case _, "(":
            if len(rule.open) == MAX_NESTING:
                raise _error(text, token, f"nested deeper than {MAX_NESTING}")
            rule.open.append(len(rule.out))
            rule.out.append("(")
            rule.last, rule.filled = None, False
        case _, ")":
            if not rule.open:
                raise _error(text, token, "no '(' is open here")
            rule.end_alternative()
            rule.out.append(")")
            rule.last, rule.filled = rule.open.pop(), True
        case _, "|":
            rule.end_alternative()
            rule.out.append("|")
        case _:  # a repetition
            if rule.last is None:
                raise _error(text, token, "nothing is there to repeat: put what is into parentheses")
            _repeat(text, rule, token)


def _repeat(text: str, rule: _Rule, token: _Token) -> None:
    assert rule.last is not None
    if token.kind == "mark":
        rule.out.append(token.text)
    else:
        least, comma, most = (part.strip() for part in token.text[1:-1].partition(","))
        most = most if comma else least
        if len(least) > _DIGITS or len(most) > _DIGITS:
            raise _error(text, token, "too many repetitions")
        if most and int(most) < int(least):
            raise _error(text, token, "the second number is smaller than the first")
        if most and int(most) == 0:
            rule.out[rule.last :] = ['""']
        else:
            rule.out.append(f"{{{int(least)},{int(most) if most else ''}}}")
    rule.last = None


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise BadGBNF(f"{_where(text, at)}: {_WRONG.get(text[at], 'not a part of GBNF')}")
        assert found.lastgroup is not None
        yield _Token(found.lastgroup, found[0], at)
        at = found.end()


_WRONG = {
    '"': "expecting '\"' at the end of the literal",
    "[": "expecting ']' at the end of the class",
    "{": "expecting a repetition: {2}, {2,} or {2,5}",
    "<": "tokens cannot be named: write their text",
    "!": "tokens cannot be named: write their text",
}


def _characters(text: str, token: _Token) -> Iterator[str]:
    """The characters a literal or a class consists of, escapes undone."""
    for found in _CHARACTER.finditer(token.text, 1, len(token.text) - 1):
        code = found[1] or found[2] or found[3]
        if code is not None:
            value = int(code, 16)
            if value > 0x10FFFF or 0xD800 <= value <= 0xDFFF:
                raise _error(text, token, f"{found[0]} is not a character")
            yield chr(value)
        elif (escaped := found[4]) is not None:
            if escaped not in _ESCAPES:
                raise _error(text, token, f"unknown escape \\{escaped}")
            yield _ESCAPES[escaped]
        else:
            yield found[5]


def _class(text: str, token: _Token) -> str:
    """A class as a regular expression of one character."""
    negated = token.text.startswith("[^")
    body = _Token("class", f"[{token.text[2:]}" if negated else token.text, token.at)
    characters = list(_characters(text, body))
    ranges: list[str] = []
    at = 0
    while at < len(characters):
        first = last = characters[at]
        if at + 2 < len(characters) and characters[at + 1] == "-":
            last = characters[at + 2]
            at += 2
            if last < first:
                raise _error(text, token, "a range that ends before it begins")
        ranges.append(f"\\x{{{ord(first):X}}}-\\x{{{ord(last):X}}}")
        at += 1
    if not ranges:
        if negated:
            return _ANY
        raise _error(text, token, "an empty class allows nothing")
    return f"/[{'^' if negated else ''}{''.join(ranges)}]/"


def quoted(text: str) -> str:
    """A text as Lark spells it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _error(text: str, token: _Token, what: str) -> BadGBNF:
    return BadGBNF(f"{_where(text, token.at)}: {what}")


def _where(text: str, at: int) -> str:
    line = text.count("\n", 0, at)
    column = at - (text.rfind("\n", 0, at) + 1)
    return f"line {line + 1}, column {column + 1}, at {text[at : at + 20]!r}"
