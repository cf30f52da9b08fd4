"""Telling one GGUF from another, for the cache of what was made from it."""

from __future__ import annotations

import os
from pathlib import Path

from perllm.edge_worker.model_files import SAMPLE_BYTES, SAMPLES, fingerprint


def test_the_same_content_installed_anew_is_known_again(tmp_path: Path) -> None:
    one, two = tmp_path / "a.gguf", tmp_path / "b.gguf"
    content = os.urandom(3 * SAMPLES * SAMPLE_BYTES)
    one.write_bytes(content)
    two.write_bytes(content)
    os.utime(two, (1, 1))
    assert fingerprint(one) == fingerprint(two)


def test_other_weights_are_told_apart(tmp_path: Path) -> None:
    """A fine-tune has the header and the size of the model it comes from; its weights differ all over."""
    path = tmp_path / "a.gguf"
    content = bytes(3 * SAMPLES * SAMPLE_BYTES)
    found = set()
    for changed in (content, content[:-1] + b"x", b"x" + content[1:], content[:100_000] + b"x" * 100_000, content[1:]):
        path.write_bytes(changed[: len(content)])
        found.add(fingerprint(path))
    assert len(found) == 5


def test_a_file_smaller_than_a_sample_has_one_too(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"tiny")
    first = fingerprint(path)
    path.write_bytes(b"tinz")
    assert fingerprint(path) != first
