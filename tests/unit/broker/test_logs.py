"""What a process says: one line for each happening, JSON from whoever speaks where that is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from perllm.broker.local.supervisor import last_words
from perllm.broker.traceparent import trace_id, valid_traceparent

SPEAK = """
import logging, sys, threading, warnings
import structlog
from perllm.broker import logs
from perllm.broker.errors import BadSetting, exit_with
from perllm.broker.settings import Settings

logs.configure(Settings(log_json=sys.argv[1] == "json"))
log = structlog.get_logger("a")
log.info("one", text="a\\nforged line \\x1b[2J")
logging.getLogger("uvicorn.error").error("two\\nof %s", "uvicorn")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("three")
if sys.argv[1] == "json":
    warnings.warn("four")
    thread = threading.Thread(target=lambda: {}["five"])
    thread.start()
    thread.join()
log.info("six")
exit_with(BadSetting("PERLLM_X: no"))
"""


def said(how: str) -> list[str]:
    ended = subprocess.run([sys.executable, "-c", SPEAK, how], check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    return ended.stderr.splitlines()


def test_every_line_is_json_where_that_is_asked_for() -> None:
    lines = said("json")
    events = [json.loads(line) for line in lines]
    assert [e["event"].partition("\n")[0] for e in events if "four" not in e["event"]] == [
        "one", "two", "three", "thread_crashed", "six", "cannot_start"
    ]  # fmt: skip
    assert events[0]["text"] == "a\nforged line \x1b[2J"
    assert "ZeroDivisionError" in events[2]["exception"]
    assert [last_words(line) for line in lines][-2:] == [None, "PERLLM_X: no"]


def test_what_users_sent_stays_on_its_line() -> None:
    lines = said("text")
    assert lines[0].count("forged line") == 1
    assert "\x1b" not in lines[0]
    assert lines[1].count("of uvicorn") == 1
    assert lines[-1] == "error: PERLLM_X: no"


TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", True),
        (f"cc-{TRACE}-b7ad6b7169203331-01-what-will-be", True),
        (f"00-{TRACE}-b7ad6b7169203331-01-no", False),
        (f"ff-{TRACE}-b7ad6b7169203331-01", False),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", False),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        ("", False),
        (None, False),
    ],
)
def test_a_trace_is_kept_if_it_is_one(given: object, kept: bool) -> None:
    found = valid_traceparent(given)
    assert (found is not None and trace_id(found) == TRACE) is kept
