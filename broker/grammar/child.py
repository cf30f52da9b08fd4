"""The process in which grammars are compiled first: it may die of one, and nobody else does.

Run by path with nothing but the standard library and llguidance, so that it is there at once. It reads grammars
(length in 4 bytes, then Lark in UTF-8) and answers each with a line of JSON: what is wrong with it ("" when nothing
is), and the CPU time it took, s. Who takes longer, more memory or more stack than allowed is ended by the kernel.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a producer may be without it: then the worker checks
    import llguidance

#: CPU time one grammar may take, s.
CPU = 1.0
#: Address space of the process, and stack for a grammar's recursion, bytes. Threads that compile what passed have at
#: least twice that stack (8 MiB usually, 2 MiB where it is unlimited).
MEMORY = 768 << 20
STACK = 1 << 20
#: Characters of an error that are passed on.
MAX_ERROR = 1000


def limits() -> llguidance.LLParserLimits:
    """What llguidance may take to build a grammar's lexer and, at each token, to compute what it allows."""
    import llguidance  # noqa: PLC0415

    return llguidance.LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def judge(tokenizer: llguidance.LLTokenizer, lark: str) -> str:
    """What is wrong with a grammar, "" when nothing is: whether it compiles, and allows any beginning at all."""
    import llguidance  # noqa: PLC0415

    matcher = llguidance.LLMatcher(tokenizer, lark, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    error = matcher.get_error()
    return "no text fits it" if error.startswith("NoExtension") else error


def _serve() -> None:
    import llguidance  # noqa: PLC0415

    tokenizer = llguidance.LLTokenizer("byte")
    read, answer = sys.stdin.buffer.read, sys.stdout.buffer
    while len(head := read(4)) == 4:
        lark = read(int.from_bytes(head, "big")).decode()
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU)  # nobody handles SIGPROF: it ends the process
        try:
            error = judge(tokenizer, lark)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        reply = {"error": error[:MAX_ERROR], "seconds": time.process_time() - began}
        answer.write(json.dumps(reply).encode() + b"\n")
        answer.flush()


def main() -> None:
    """Until standard input ends: when the parent closes it, or dies."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)  # others' work goes before it
    threading.stack_size(STACK)
    serving = threading.Thread(target=_serve)
    serving.start()
    serving.join()


if __name__ == "__main__":
    main()
