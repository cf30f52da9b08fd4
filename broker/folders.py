"""Files and folders that only their user may write, and that a link laid in the way does not turn elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from broker.errors import BadSetting


def own_folder(path: Path, variable: str) -> Path:
    """The folder, made for its user alone if it is not there. Raises BadSetting, naming the variable that chooses it,
    where everybody may write: what is read back there (data, models, compiled code) would be anybody's. OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o002:
        raise BadSetting(f"everybody may write in {path}: `chmod o-w` it, or set another {variable}")
    return path


def open_own(path: Path, mode: str) -> IO[bytes]:
    """`open`, in binary, of a file that is made for its user alone. Raises OSError for a link."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600))


def write_own(path: Path, text: str) -> None:
    """Write a file for its user alone, whole or not at all: half a password would be kept for good. A link that lies
    there is replaced."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open_own(part, "xb") as file:
            file.write(text.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
