"""Whatever calls a function of ours on the server, `perllm ledger load` has put it there."""

from __future__ import annotations

import re
from pathlib import Path

from broker import functions

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker", "scheduler", "edge_worker", "cloud_worker")


def sources() -> dict[str, str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}


def test_every_module_that_defines_functions_is_loaded() -> None:
    defining = {name for name, text in sources().items() if re.search(r"^_?\w+ = (Function|Library)\(", text, re.M)}
    assert defining == set(functions._MODULES)


def test_nobody_runs_a_script() -> None:
    """No role may (compose/users.acl)."""
    scripts = r"register_script|script_load|\.eval(sha)?\(|\.lock\(|\"(EVAL|EVALSHA|SCRIPT)\""
    assert {name for name, text in sources().items() if re.search(scripts, text)} == set()


def test_a_librarys_name_changes_with_its_text() -> None:
    one, other = functions.Function("unit", "return 1"), functions.Function("unit", "return 2")
    del functions.Library.known[one.name], functions.Library.known[other.name]
    assert one.name != other.name
    assert one.name in one.source
    assert "allow-oom" not in one.source
