"""Grammars, JSON schemas and tools that users give: into one form (Lark, as llguidance reads it), and checked in a
process of its own before anything else compiles them.

What has passed the check compiles within bounded time, memory and stack, so that the engines' processes may do it too;
what it costs at each token is bounded there while it runs, by the limits below.
"""

from perllm.broker.grammar.answer import is_held
from perllm.broker.grammar.checker import check, check_from_loop, lark
from perllm.broker.grammar.child import limits

__all__ = ["check", "check_from_loop", "is_held", "lark", "limits"]
