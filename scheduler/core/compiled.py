"""numba's just-in-time compiler, with a cache on disk that cannot go stale.

numba keys its cache by the file a function is in, so a change in a function it calls elsewhere goes unnoticed. Here the
cache folder is named by a digest of every source file that compiled functions are in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


@cache
def _folder() -> Path | None:
    """`$XDG_CACHE_HOME/perllm/<digest>`, or None where nothing can be written (then every start compiles anew)."""
    digest = hashlib.sha256(numba.__version__.encode())
    for package in ("core", "csucb"):
        for source in sorted((Path(__file__).parent.parent / package).glob("*.py")):
            digest.update(source.read_bytes())
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "perllm" / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def compiled(function: F) -> F:
    """Compile `function` for the argument types it is first called with: numbers, numpy arrays (structured ones too)
    and NamedTuples of these."""
    folder, config = _folder(), cast(Any, numba).config
    before = config.CACHE_DIR
    try:
        if folder is not None:
            config.CACHE_DIR = str(folder)
        return cast(F, numba.njit(cache=folder is not None, error_model="numpy")(function))
    finally:
        config.CACHE_DIR = before
