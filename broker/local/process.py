"""Child processes that never outlive their parent."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


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
    children in the right order. Output is appended to `log`. The child inherits the file descriptors `keep`; `umask` -1
    is the parent's."""
    with log.open("ab") as output:
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


def _die_with_parent() -> None:
    """On Linux, be killed when the parent ends, even by SIGKILL: PR_SET_PDEATHSIG, prctl(2)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
