"""Child processes that never outlive their parent."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from perllm.broker.private_files import open_own

#: Bytes of output after which a log is begun anew; the former is kept beside it, as `<name>.1`.
LOG_LIMIT = 16 << 20


def spawn(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    keep: Sequence[int] = (),
    umask: int = -1,
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, so that a Ctrl-C in the terminal reaches only the parent, which stops its
    children in the right order. Output is appended to `log`, made for its user alone. The child inherits the file
    descriptors `keep`; `umask` -1 is the parent's. Raises OSError."""
    with open_own(log, "ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=keep,
            umask=umask,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  one system call, safe beside threads
        )


def keep_small(log: Path, limit: int = LOG_LIMIT) -> None:
    """Begin a log anew once it is longer than `limit` bytes. Those who write it go on: they append. On a full disk the
    old lines are dropped rather than kept."""
    with suppress(OSError):
        if log.stat().st_size <= limit:
            return
        old = log.with_name(f"{log.name}.1")
        old.unlink(missing_ok=True)
        try:
            with log.open("rb") as source, open_own(old, "xb") as kept:
                shutil.copyfileobj(source, kept)
        except OSError:
            old.unlink(missing_ok=True)
        os.truncate(log, 0)


def _die_with_parent() -> None:
    """On Linux, be killed when the parent ends, even by SIGKILL: PR_SET_PDEATHSIG, prctl(2)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
