"""Files and folders that are nobody else's business: 0700 and 0600 whatever the umask, and never through a link."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from perllm.broker.errors import BadSetting

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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


def private_folder(path: Path, *, given: bool = False) -> Path:
    """Make a folder only its user can enter, or make one that is there so. `given`: an operator named it, so one that
    is there stays as it is, and may be a link. Raises BadSetting."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if given:
            return path
        if path.is_symlink():
            raise BadSetting(f"{path} is a link, and none is followed here: remove it")
        found = path.stat()
        if found.st_mode & 0o077 and found.st_uid == os.geteuid():
            path.chmod(0o700)
    except OSError as error:
        raise BadSetting(f"the data folder {path} cannot be used ({error.strerror}): set PERLLM_DATA_DIR") from None
    return path


class Drawers:
    """Files in folders of one root, `<folder>/<name>` each, opened step by step so that no link is followed."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def open(self, folder: str, name: str, mode: str) -> IO[bytes]:
        """A file to read ("rb"), or a new or emptied one to write ("wb"). Raises OSError."""
        inside = self._enter(folder, make=mode == "wb")
        try:
            flags = os.O_RDONLY if mode == "rb" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            found = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=inside)
            if mode == "wb":
                os.fchmod(found, 0o600)
            return os.fdopen(found, mode)
        finally:
            os.close(inside)

    def exists(self, folder: str, name: str) -> bool:
        """Whether it is there, and no link."""
        try:
            inside = self._enter(folder)
        except OSError:
            return False
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=inside, follow_symlinks=False).st_mode)
        except OSError:
            return False
        finally:
            os.close(inside)

    def rename(self, folder: str, old: str, new: str) -> None:
        """Give a file another name, in place of what has it. Raises OSError."""
        inside = self._enter(folder)
        try:
            os.replace(old, new, src_dir_fd=inside, dst_dir_fd=inside)
        finally:
            os.close(inside)

    def discard(self, folder: str, name: str) -> None:
        """Remove it, if it is there."""
        with suppress(FileNotFoundError):
            inside = self._enter(folder)
            try:
                os.unlink(name, dir_fd=inside)
            finally:
                os.close(inside)

    def _enter(self, folder: str, *, make: bool = False) -> int:
        root = os.open(self._root, _FOLDER)
        try:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=root)
            inside = os.open(folder, _FOLDER, dir_fd=root)
        finally:
            os.close(root)
        if make:
            os.fchmod(inside, 0o700)
        return inside
