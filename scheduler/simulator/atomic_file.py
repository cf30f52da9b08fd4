"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from perllm.broker.errors import BadSetting


def make_folder(folder: Path) -> None:
    """Make sure there is such a folder. Raises BadSetting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"output {folder}: {error.strerror}") from None


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place: there is no half-written file.

    Raises BadSetting when it cannot be written.
    """
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise BadSetting(f"output {path}: {error.strerror}") from None
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise BadSetting(f"output {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
