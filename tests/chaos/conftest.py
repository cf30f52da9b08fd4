"""What all these tests share."""

from __future__ import annotations

import pytest

from chaos.perllm import PYTHONPATH


@pytest.fixture(autouse=True)
def _our_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find `support` and `chaos`."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
