"""GBNF as Lark: the same texts are allowed, and what is no GBNF is named with its place."""

from __future__ import annotations

import llguidance
import pytest

from perllm.broker.grammar.gbnf import BadGBNF, to_lark

BYTES = llguidance.LLTokenizer("byte")


def allows(grammar: str, text: str) -> bool:
    """Whether `text` is whole and right by the grammar."""
    matcher = llguidance.LLMatcher(BYTES, f'%llguidance {{"no_forcing": true}}\n{to_lark(grammar)}', log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    raw = list(text.encode())
    return matcher.try_consume_tokens(raw) == len(raw) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "yes" | "no"', ["yes", "no"], ["", "maybe", "yesno"]),
        ('root ::= "yes" | "no" | [a-z]+ "!"', ["yes", "yellow!", "yes!", "nobody!"], ["yellow"]),
        ('root ::= [a-c]+ "ab"', ["cab", "ababab"], ["ab", "abc"]),
        ('root ::= word "ab"\nword ::= [a-c]+', ["cab"], ["ab"]),
        ('root ::= "a"* "b"+ "c"?', ["b", "aabbc"], ["a", "abcc"]),
        ('root ::= "a"{2} "b"{1,2} "c"{2,} "d"{0,0}', ["aabcc", "aabbccc"], ["abcc", "aabc", "aabccd"]),
        ('root ::= ("a"*)* "ab"{2}', ["abab", "aaaabab"], ["ab"]),
        ('root ::= ("a" | ) ("b" | "c" (\n  "d" # a comment\n))', ["b", "ab", "acd"], ["ac", "abcd"]),
        ('root ::= "a" |\n  "b"\n\n# more\nother ::= root', ["a", "b"], ["ab"]),
        (
            r'root ::= "\"\\\n\x41\u00e9\U0001F600" [\]\\^a-]',
            ['"\\\nAé😀]', '"\\\nAé😀-', '"\\\nAé😀^'],
            ['"\\\nAé😀b'],
        ),
        ("root ::= [^a-c/] . [é-ü]", ["d\nü", "é/é"], ["adé", "/xé", "dxa"]),
        ('root ::= list\nlist ::= "x" | list "," "x"\nunused-one ::= "y"', ["x", "x,x,x"], ["x,"]),
        ("root ::=", [""], ["a"]),
        ("root ::= [^]", ["a", "é"], ["", "aa"]),
    ],
)
def test_it_allows_what_the_grammar_does(grammar: str, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert allows(grammar, text), text
    for text in bad:
        assert not allows(grammar, text), text


@pytest.mark.parametrize(
    ("grammar", "complaint"),
    [
        ("", "no rule named 'root'"),
        ('other ::= "a"', "no rule named 'root'"),
        ("hello", "line 1, column 1, at 'hello': a rule begins with its name and ::="),
        ("root ::= x", "line 1, column 10, at 'x': there is no rule named 'x'"),
        ('root ::= "a"\n"b"', "line 2, column 1"),
        ('root ::= "a"\nroot ::= "b"', "the rule 'root' is there 2 times"),
        ("root ::= (", r"expecting '\)'"),
        ("root ::= )", r"no '\(' is open"),
        ('root ::= "a', "expecting '\"'"),
        ("root ::= [a", "expecting ']'"),
        ("root ::= [z-a]", "a range that ends before it begins"),
        ("root ::= []", "allows nothing"),
        ('root ::= "a"{3,2}', "smaller than the first"),
        ('root ::= "a"{9999999999}', "too many repetitions"),
        ('root ::= "a"**', "nothing is there to repeat"),
        ("root ::= | *", "nothing is there to repeat"),
        (r'root ::= "\q"', r"unknown escape \\q"),
        (r'root ::= "\ud800"', "is not a character"),
        ("root ::= <[5]>", "tokens cannot be named"),
        ("root ::= " + "(" * 65 + '"a"' + ")" * 65, "nested deeper than 64"),
        ("\0", "not a part of GBNF"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(grammar: str, complaint: str) -> None:
    with pytest.raises(BadGBNF, match=complaint):
        to_lark(grammar)
