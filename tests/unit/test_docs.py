"""The documents name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["reliability.md", "security.md"])
def test_every_test_the_promises_name_exists(document: str) -> None:
    named, file = 0, Path()
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    for path, function in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", text.replace("tests/", "")):
        file = ROOT / "tests" / path if path else file
        if path:
            assert file.exists() or (ROOT / path).exists(), path
        if function:
            assert f"def {function}(" in file.read_text(encoding="utf-8"), f"{file.name}::{function}"
            named += 1
    assert named > 20
